"""The damage of every possible interval, as a map."""

from __future__ import annotations

import torch

from ...plan import PruningPlan
from .canvas import (
    DAMAGE_COLOURS,
    INK,
    QUIET,
    VERMILION,
    WIDTH,
    draw_text,
    new_figure,
    png_bytes,
    range_text,
    tidy,
)


def damage_map(plan: PruningPlan, damage: torch.Tensor) -> bytes:
    """A PNG: a column for each first block, a row for each length; chosen intervals are outlined.
    damage [blocks, longest]: at [u, j], of replacing blocks u to u + j."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import FuncFormatter

    damage = damage[:-1]  # no interval starts at the last block
    blocks, longest = damage.shape
    positive = damage[damage > 0]
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (1e-6, 1.0)
    height = 0.95 + 0.3 * (longest - 1)
    figure = new_figure(height)
    share = (height - 0.95) / height
    axes = figure.add_axes((0.85 / WIDTH, 0.62 / height, (WIDTH - 2.05) / WIDTH, share))
    tidy(axes, grid=False)
    colours = LinearSegmentedColormap.from_list("damage", DAMAGE_COLOURS)
    cells = damage[:, 1:].T.clamp_min(low).numpy()
    corners = [x - 0.5 for x in range(blocks + 1)], [y + 1.5 for y in range(longest)]
    image = axes.pcolormesh(
        *corners,
        cells,
        cmap=colours,
        norm=LogNorm(low, max(high, 1.01 * low)),
        edgecolor="white",
        lw=0.8,
    )
    _outlines(axes, plan, blocks)
    axes.set_xticks(range(0, blocks, 1 if blocks <= 40 else 5))
    axes.set_yticks(range(2, longest + 1))
    axes.set_xlabel("first block of the interval, u", fontsize=9, color=QUIET)
    axes.set_ylabel("blocks in it", fontsize=9, color=QUIET)
    bar = figure.colorbar(
        image, cax=figure.add_axes((1 - 0.95 / WIDTH, 0.62 / height, 0.14 / WIDTH, share))
    )
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.tick_params(labelsize=8, colors=QUIET, length=0, which="both")
    bar.ax.set_title("damage", fontsize=8.5, color=QUIET, loc="left", pad=6)
    return png_bytes(figure)


def _outlines(axes, plan: PruningPlan, blocks: int) -> None:
    """A frame around the cell of each chosen interval, its name beside it."""
    from matplotlib.patches import Rectangle

    reach = 1 + 0.06 * blocks  # cells that the outline of an interval and its label cover
    for interval in plan.intervals:
        box = (interval.first - 0.5, interval.removed + 0.5)
        axes.add_patch(
            Rectangle(box, 1, 1, fill=False, edgecolor=VERMILION, lw=2.4, clip_on=False, zorder=4)
        )
        crowded = any(
            i.removed == interval.removed and 0 < i.first - interval.first < reach
            for i in plan.intervals
        )
        beside = not crowded and interval.first < blocks - reach
        draw_text(
            axes,
            interval.first + (0.68 if beside else -0.68),
            interval.removed + 1,
            range_text(interval),
            size=8,
            weight="bold",
            color=INK,
            ha="left" if beside else "right",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.9},
        )
