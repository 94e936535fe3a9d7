"""Line charts of a pruning run: alignment, losses, velocity errors, errors of probes. Each function
returns a PNG."""

from __future__ import annotations

import math

import torch

from ...plan import Interval, PruningPlan
from .canvas import (
    BAND,
    BLUE,
    INK,
    LINES,
    MARKERS,
    QUIET,
    SHADE,
    VERMILION,
    draw_text,
    logarithmic,
    new_figure,
    png_bytes,
    range_text,
    shortened,
    spread,
    tidy,
)


def cka_curves(plan: PruningPlan, cka: torch.Tensor) -> bytes:
    """For each interval's first block u the curve cka(u, k), and below it its first difference D.
    cka: [blocks, longest, 1 + resamples], as `Curves.cka`."""
    columns = min(3, len(plan.intervals))
    rows = math.ceil(len(plan.intervals) / columns)
    height = 2.75 * rows + 0.45
    figure = new_figure(height)
    grid = figure.add_gridspec(
        rows,
        columns,
        left=0.07,
        right=0.985,
        top=1 - 0.72 / height,
        bottom=0.5 / height,
        hspace=0.42,
        wspace=0.22,
    )
    for number, interval in enumerate(plan.intervals):
        inner = grid[number // columns, number % columns].subgridspec(
            2, 1, height_ratios=(1.7, 1), hspace=0.14
        )
        _cka_panel(
            figure.add_subplot(inner[0]),
            figure.add_subplot(inner[1]),
            interval,
            cka[interval.first],
            number % columns == 0,
        )
    _curve_legend(figure, cka.shape[2] > 1, height)
    return png_bytes(figure)


def _cka_panel(upper, lower, interval: Interval, rows: torch.Tensor, first_column: bool) -> None:
    """rows [longest, 1 + resamples]"""
    from matplotlib.ticker import MaxNLocator

    rows = torch.cat([torch.ones_like(rows[:1]), rows[1:][~rows[1:, 0].isnan()]])
    blocks = list(range(interval.first, interval.first + len(rows)))
    end = min(interval.last - interval.first, len(rows) - 1)
    for axes in (upper, lower):
        tidy(axes)
        axes.axvspan(interval.first - 0.5, interval.last + 0.5, color=SHADE, lw=0)
        axes.axvline(interval.last + 0.5, color=VERMILION, lw=1.2, ls=(0, (4, 2)))
        axes.set_xlim(interval.first - 0.5, interval.first + max(len(rows) - 1, 1) + 0.5)
        axes.set_xticks(blocks)
    if rows.shape[1] > 1:
        low, high = (torch.nanquantile(rows[:, 1:], share, dim=1) for share in BAND)
        upper.fill_between(blocks, low.numpy(), high.numpy(), color=BLUE, alpha=0.22, lw=0)
    upper.plot(blocks, rows[:, 0].numpy(), color=BLUE, lw=1.8, marker="o", ms=3.5)
    upper.plot(blocks[end], float(rows[end, 0]), "o", color=VERMILION, ms=7, zorder=5)
    upper.tick_params(labelbottom=False)
    upper.set_title(
        f"Blocks {range_text(interval)}", loc="left", fontsize=10, fontweight="bold", color=INK
    )
    drops = (rows[:-1, 0] - rows[1:, 0]).tolist()
    lower.axhline(0, color=QUIET, lw=0.7)
    upper.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
    lower.yaxis.set_major_locator(MaxNLocator(2, min_n_ticks=2))
    lower.bar(
        blocks[1:],
        drops,
        width=0.62,
        color=[BLUE if b <= interval.last else "#9BA8B4" for b in blocks[1:]],
    )
    lower.set_xlabel("k", fontsize=8.5, color=QUIET, labelpad=1)
    if first_column:
        upper.set_ylabel("cka(u, k)", fontsize=8.5, color=QUIET)
        lower.set_ylabel("D(u, k)", fontsize=8.5, color=QUIET)


def _curve_legend(figure, band: bool, height: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=BLUE, lw=1.8, marker="o", ms=3.5, label="alignment cka(u, k)"),
        *([Patch(facecolor=BLUE, alpha=0.22, label="95 % of resamples")] if band else []),
        Patch(facecolor=SHADE, label="chosen interval"),
        Line2D([], [], color=VERMILION, lw=1.2, ls=(0, (4, 2)), marker="o", ms=6, label="its end"),
        Patch(facecolor=BLUE, label="D, drop at block k"),
    ]
    legend = figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.065, 1 - 0.08 / height),
        ncols=5,
        frameon=False,
        fontsize=8.5,
        borderaxespad=0,
        borderpad=0,
        handlelength=2,
        columnspacing=2,
    )
    for entry in legend.get_texts():
        entry.set_color(INK)


def loss_curves(losses: dict[str, torch.Tensor]) -> bytes:
    """losses: interval name -> [updates]. Faint: each update; bold: running mean."""
    from matplotlib import colormaps

    names = list(losses)
    shades = colormaps["viridis"]
    colours = (
        LINES
        if len(names) <= len(LINES)
        else [shades(0.86 * i / (len(names) - 1)) for i in range(len(names))]
    )
    figure = new_figure(max(3.9, 0.21 * len(names) + 0.6))
    axes = figure.add_axes(
        (0.07, 0.54 / figure.get_figheight(), 0.84, 1 - 0.64 / figure.get_figheight())
    )
    tidy(axes)
    smoothed = {name: _running_mean(values) for name, values in losses.items()}
    for name, colour in zip(names, colours, strict=False):
        axes.plot(
            losses[name].numpy(),
            color=colour,
            lw=0.6,
            alpha=0.25 if len(names) <= len(LINES) else 0.1,
        )
        axes.plot(smoothed[name].numpy(), color=colour, lw=2)
    logarithmic(axes)
    axes.set_xlim(0, max(max(len(values) for values in losses.values()) - 1, 1))
    axes.set_xlabel("update", fontsize=9, color=QUIET)
    axes.set_ylabel("loss", fontsize=9, color=QUIET)
    ends = {name: float(values[-1]) for name, values in smoothed.items()}
    _end_labels(
        axes,
        ends,
        {name: name.replace("-", "–") for name in names},
        dict(zip(names, colours, strict=False)),
    )
    return png_bytes(figure)


def _running_mean(values: torch.Tensor) -> torch.Tensor:
    """Geometric, over a twentieth of the curve."""
    reach = len(values) // 40
    logs = values.clamp_min(1e-12).log()
    padded = torch.cat([logs[1 : reach + 1].flip(0), logs, logs[-reach - 1 : -1].flip(0)])
    return padded.unfold(0, 2 * reach + 1, 1).mean(dim=1).exp()


def _end_labels(axes, ends: dict[str, float], labels: dict[str, str], colours: dict) -> None:
    """Writes names at the right of curves that end at the heights `ends`, on a logarithmic axis."""
    low, high = (math.log10(y) for y in axes.get_ylim())
    names = sorted(ends, key=ends.__getitem__)
    gap = 0.2 / (axes.figure.get_figheight() * axes.get_position().height)
    heights = [
        max(0.0, (math.log10(max(ends[name], 1e-12)) - low) / (high - low)) for name in names
    ]
    for name, height in zip(names, spread(heights, gap), strict=True):
        draw_text(
            axes,
            1.012,
            height,
            labels[name],
            size=9.5,
            weight="bold",
            color=colours[name],
            transform=axes.transAxes,
        )


def velocity_errors(rows: dict[str, list[dict]]) -> bytes:
    """rows: variant -> [{"t", "value", "low", "high"}]. Relative squared error of the velocity."""
    figure = new_figure(3.7)
    axes = figure.add_axes((0.07, 0.14, 0.8, 0.83))
    tidy(axes)
    for number, points in enumerate(rows.values()):
        colour, t = LINES[number % len(LINES)], [p["t"] for p in points]
        axes.fill_between(
            t,
            [p["low"] for p in points],
            [p["high"] for p in points],
            color=colour,
            alpha=0.16,
            lw=0,
        )
        axes.plot(
            t,
            [p["value"] for p in points],
            color=colour,
            lw=2,
            marker=MARKERS[number % len(MARKERS)],
            ms=5,
            clip_on=False,
        )
    logarithmic(axes)
    axes.set_xlim(0, max((p[-1]["t"] for p in rows.values()), default=1.0))
    axes.set_xlabel("timestep t  (0: picture, 1: noise)", fontsize=9, color=QUIET)
    axes.set_ylabel("velocity error", fontsize=9, color=QUIET)
    colours = {name: LINES[number % len(LINES)] for number, name in enumerate(rows)}
    _end_labels(
        axes,
        {n: p[-1]["value"] for n, p in rows.items()},
        {n: shortened(n, 18) for n in rows},
        colours,
    )
    return png_bytes(figure)


def probe_chart(errors: dict[str, dict[int, float]]) -> bytes:
    """errors: stream -> block -> error of its linear map. A line for each stream, logarithmic: blocks
    near the bottom are nearly linear."""
    figure = new_figure(3.4)
    axes = figure.add_axes((0.075, 0.15, 0.905, 0.72))
    tidy(axes)
    for (stream, row), colour in zip(errors.items(), LINES, strict=False):
        values = [max(value, 1e-9) for value in row.values()]
        axes.plot(
            list(row),
            values,
            color=colour,
            lw=1.8,
            marker="o",
            ms=4.5,
            label=f"{stream} stream",
            clip_on=False,
        )
    logarithmic(axes)
    count = 1 + max(max(row) for row in errors.values())
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_xticks(range(0, count, 1 if count <= 40 else 5))
    axes.set_xlabel("teacher block", fontsize=9, color=QUIET)
    axes.set_ylabel("error of a linear map", fontsize=9, color=QUIET)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(errors),
        frameon=False,
        fontsize=9,
        borderaxespad=0.4,
    )
    axes.set_title(
        "What a linear map leaves of each block's step",
        loc="left",
        fontsize=10,
        fontweight="bold",
        color=INK,
    )
    return png_bytes(figure)
