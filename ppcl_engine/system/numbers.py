"""Numbers as people read them, one function for each kind: parameters, bytes, and times."""

from __future__ import annotations


def count_text(count: float) -> str:
    """A count of parameters: 20.43 B, 8.11 M, 512 k."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f}"


def bytes_text(count: float) -> str:
    """23.86 GB, 16.2 MB"""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def seconds_text(seconds: float) -> str:
    """The time of a step: 1.25 s, 8.3 ms."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def speed_text(rate: float) -> str:
    """Steps a second: 2.5/s; 40 s each."""
    return f"{rate:.1f}/s" if rate >= 0.1 else f"{1 / rate:.0f} s each"


def duration_text(seconds: float) -> str:
    """The time of a run: 40 s, 6 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
