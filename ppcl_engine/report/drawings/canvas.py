"""What all drawings share: colours, an empty figure, plain axes, text, the bytes of a PNG.

matplotlib is imported when something is drawn, and never pyplot, so no global state changes.
"""

from __future__ import annotations

import io
from functools import lru_cache

from ...plan import Interval

BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
)
LINES = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, QUIET, RULE, KEPT = "#1B2733", "#5C6B7A", "#D9DFE5", "#C9D2DB"
RESTORED, SHADE = "#FBE3B4", "#E3F0F8"
SITE_MARKS = {
    "text": "s",
    "ffn_image": "D",
    "ffn_text": "^",
    "ffn_joint": "v",
}  # markers of width sites; a text group is a band
SITE_NAMES = {
    "text": "text stream",
    "ffn_image": "image FFN",
    "ffn_text": "text FFN",
    "ffn_joint": "FFN of both streams",
}
DAMAGE_COLOURS = ("#F4F8FB", "#A9CDE4", "#3F8FC1", "#0B4F80", "#062A47")
WIDTH = 10.0  # inches; shown about 1070 pixels wide, so 9 points read as 13 pixels
DPI = 180
BAND = (0.025, 0.975)


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def drawable(text: str) -> str:
    """The text with boxes for the characters that the pictures' font lacks; the page shows them."""
    return "".join(c if ord(c) in _characters() or c.isspace() else "▯" for c in text)


def new_figure(height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes, grid: bool = True) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" and grid)
        spine.set_color(QUIET)
    axes.tick_params(labelsize=8.5, colors=QUIET, length=0, which="both")
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis="y", color=RULE, lw=0.7)


def logarithmic(axes) -> None:
    """Makes the y axis logarithmic, with plain numbers; the smaller its range, the more of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (
        (1,)
        if high / low > 1000
        else (1, 2, 5)
        if high / low > 8
        else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    )
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=30))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def label(figure, x: float, y: float, text: str, **style) -> None:
    figure.text(
        x, y, text, **{"size": 9.5, "color": INK, "va": "center", "parse_math": False, **style}
    )


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def draw_text(axes, x: float, y: float, text: str, **style) -> None:
    style = {
        "size": 9.5,
        "color": INK,
        "va": "center",
        "clip_on": False,
        "parse_math": False,
        **style,
    }
    axes.text(x, y, text, **style)


def png_bytes(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def range_text(interval: Interval) -> str:
    return f"{interval.first}–{interval.last}"


def spread(heights: list[float], gap: float) -> list[float]:
    """Ascending heights, moved as little as possible (least squares) so that they are `gap` apart.

    Pool adjacent violators on height - i * gap (Ayer et al. 1955).
    """
    pools: list[list[float]] = []  # [mean, count]
    for index, height in enumerate(heights):
        pools.append([height - index * gap, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (m1, n1), (m2, n2) = pools[-2:]
            pools[-2:] = [[(m1 * n1 + m2 * n2) / (n1 + n2), n1 + n2]]
    even = [mean for mean, count in pools for _ in range(int(count))]
    return [mean + index * gap for index, mean in enumerate(even)]
