"""Numbers as people read them: 11.9 B, 23.86 GB, 6 min."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def exact_duration_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{rest} s"
    )


def count_text(count: float) -> str:
    """20.4 B, 58.3 M, 512 k"""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{count:.0f}"


def counted(parameters: float) -> str:
    """20.43 B, 8.11 M"""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def size_text(size: float) -> str:
    """23.86 GB; with more digits where there is less, since GB is what people compare"""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e9:.4f} GB"


def speed_text(rate: float) -> str:
    return f"{rate:.1f}/s" if rate >= 0.1 else f"{1 / rate:.0f} s each"


def duration_text(seconds: float) -> str:
    """40 s, 6 min, 3 h 20 min"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
