"""The drawing of preview.png: losses above, rows of pictures below. It can be read when it is shown 640
pixels wide."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .canvas import BLUE, INK, LINES, QUIET, VERMILION, logarithmic, png_bytes, tidy

WIDTH, DPI = 6.4, 150  # inches: 960 pixels, sharp on dense screens
CURVE_HEIGHT, TEXT_WIDTH = 2.7, 0.95
MANY = len(LINES)
LEAST_LOSS = 1e-12
# names of the axes: across, up
LOSSES, LAYER_ERRORS = ("update", "loss"), ("block", "error of a layer")


@dataclass(frozen=True)
class Row:
    """A row of pictures of one model."""

    name: str
    pictures: torch.Tensor
    """[n, 3, height, width] in [0, 1]"""


def sheet(
    curves: dict[str, dict[int, float]],
    rows: list[Row],
    across: str = LOSSES[0],
    up: str = LOSSES[1],
) -> bytes:
    """A PNG. curves: name -> {update: loss}, or whatever `across` and `up` name."""
    heights = [CURVE_HEIGHT if curves else 0.0, *(_row_height(row) for row in rows)]
    figure = _figure(sum(heights) + (0.1 if rows else 0.0))
    top = figure.get_figheight()
    if curves:
        _draw_curves(figure, curves, across, up)
        top -= CURVE_HEIGHT
    for row, height in zip(rows, heights[1:], strict=True):
        _draw_row(figure, row, top, height)
        top -= height
    return png_bytes(figure)


def smoothed(values: list[float]) -> list[float]:
    """Geometric running mean over a twentieth of the curve."""
    logs, reach = torch.tensor(values, dtype=torch.float64).log(), len(values) // 40
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), logs.cumsum(0)])
    places = torch.arange(len(values))
    low, high = (places - reach).clamp_min(0), (places + reach + 1).clamp_max(len(values))
    return ((sums[high] - sums[low]) / (high - low)).exp().tolist()


def _figure(height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _draw_curves(figure, curves: dict[str, dict[int, float]], across: str, up: str) -> None:
    height = figure.get_figheight()
    axes = figure.add_axes(
        (0.11, 1 - (CURVE_HEIGHT - 0.45) / height, 0.86, (CURVE_HEIGHT - 0.82) / height)
    )
    tidy(axes)
    lines = {name: line for name, points in curves.items() if (line := _line(points))}
    few = len(lines) <= MANY
    for number, (name, (steps, values)) in enumerate(lines.items()):
        colour = LINES[number] if few else BLUE
        axes.plot(steps, values, color=colour, lw=0.6, alpha=0.25 if few else 0.12)
        axes.plot(
            steps,
            smoothed(values),
            color=colour,
            lw=1.8 if few else 0.9,
            alpha=1 if few else 0.55,
            label=name if few else None,
            marker="o" if len(steps) == 1 else None,
            ms=4,
        )
    if not few:
        _draw_mean(axes, lines)
    if lines:
        logarithmic(axes)
    axes.set_xlim(0, max((steps[-1] for steps, _ in lines.values()), default=1) or 1)
    axes.tick_params(labelsize=9.5)
    axes.set_xlabel(across, fontsize=10, color=QUIET, labelpad=2)
    axes.set_ylabel(up, fontsize=10, color=QUIET, labelpad=2)
    legend = figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.1, 1 - 0.03 / height),
        ncols=min(3, len(lines)) if few else 2,
        frameon=False,
        fontsize=9.5,
        handlelength=1.4,
        columnspacing=1.4,
        borderaxespad=0,
        labelspacing=0.2,
    )
    for text in legend.get_texts():
        text.set_color(INK)


def _line(points: dict[int, float]) -> tuple[list[int], list[float]] | None:
    """Steps and losses without those that have no logarithm: the loss of a part whose output nothing
    reads is 0. None if none is left."""
    steps = [step for step in sorted(points) if points[step] > LEAST_LOSS]
    return (steps, [points[step] for step in steps]) if steps else None


def _draw_mean(axes, lines: dict[str, tuple[list[int], list[float]]]) -> None:
    """Draws the geometric mean of many lines, over the steps that all of them have, and the line that
    ends highest."""
    common = sorted(set.intersection(*(set(steps) for steps, _ in lines.values())))
    if common:
        chosen = [
            [dict(zip(*line, strict=True))[step] for step in common] for line in lines.values()
        ]
        mean = torch.tensor(chosen, dtype=torch.float64).log().mean(0).exp().tolist()
        axes.plot(
            common, smoothed(mean), color=INK, lw=2.2, label=f"geometric mean of {len(lines)}"
        )
    worst = max(lines, key=lambda name: smoothed(lines[name][1])[-1])
    axes.plot(
        lines[worst][0],
        smoothed(lines[worst][1]),
        color=VERMILION,
        lw=1.8,
        label=f"worst at the end: {worst}",
    )


def _row_height(row: Row) -> float:
    _, _, height, width = row.pictures.shape
    return _picture_width(row) * height / width + 0.06


def _picture_width(row: Row) -> float:
    count = max(len(row.pictures), 3)  # one or two are not blown up
    return (WIDTH - TEXT_WIDTH - 0.15) / count - 0.06


def _draw_row(figure, row: Row, top: float, height: float) -> None:
    total, wide = figure.get_figheight(), _picture_width(row)
    figure.text(
        0.12 / WIDTH,
        (top - height / 2) / total,
        row.name,
        fontsize=10,
        color=INK,
        va="center",
        parse_math=False,
    )
    for number, picture in enumerate(row.pictures):
        left = TEXT_WIDTH + number * (wide + 0.06)
        axes = figure.add_axes(
            (left / WIDTH, (top - height + 0.06) / total, wide / WIDTH, (height - 0.06) / total)
        )
        axes.imshow(
            picture.movedim(0, -1).clamp(0, 1).numpy(), interpolation="nearest", aspect="auto"
        )
        axes.set_axis_off()
