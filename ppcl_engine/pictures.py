"""Drawings of a pruning run, each a function from numbers to the bytes of a PNG.

Colours are Okabe and Ito's (2008), which colour-blind readers tell apart. matplotlib is imported
when something is drawn, and never through pyplot, so nothing global changes.
"""

from __future__ import annotations

import math
import textwrap

import torch

from .canvas import (
    BAND,
    BLUE,
    DAMAGE_COLOURS,
    INK,
    KEPT,
    LINES,
    MARKERS,
    ORANGE,
    QUIET,
    RESTORED,
    SHADE,
    VERMILION,
    WIDTH,
    draw_text,
    drawable,
    label,
    logarithmic,
    new_figure,
    png_bytes,
    shortened,
    tidy,
)
from .plan import Interval, PruningPlan, Variant

MAP_LEFT, MAP_RIGHT = 1.3, 1.45  # inches for names and for parameters


def count_text(count: float) -> str:
    """20.4 B, 58.3 M, 512 k"""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{count:.0f}"


def layer_map(plan: PruningPlan, variants: list[Variant], parameters: dict[str, int], teacher: int) -> bytes:
    """One row a variant, one cell a teacher block, parameters at the right. `teacher`: its parameters."""
    blocks, rows = plan.num_blocks, len(variants)
    levels = _label_levels(sorted(plan.intervals, key=lambda i: i.first), blocks)
    above, below = 0.45 + 0.24 * max(levels.values(), default=0), 0.78
    height = above + 0.42 * rows + below
    figure = new_figure(height)
    axes = figure.add_axes((MAP_LEFT / WIDTH, below / height, 1 - (MAP_LEFT + MAP_RIGHT) / WIDTH, 0.42 * rows / height))
    axes.set(xlim=(0, blocks), ylim=(rows, 0))
    axes.axis("off")
    for row, variant in enumerate(variants):
        _map_row(axes, plan, variant, row)
        middle = (below + 0.42 * (rows - row - 0.5)) / height
        label(figure, 0.05 / WIDTH, middle, shortened(variant.name, 16), weight="bold")
        count = parameters.get(variant.name)
        if count:
            label(figure, 1 - 0.72 / WIDTH, middle, count_text(count), ha="right", size=10)
            label(figure, 1 - 0.05 / WIDTH, middle, f"{100 * count / teacher:.1f} %", ha="right", color=QUIET)
    step = 1 if blocks <= 40 else 5
    for block in range(0, blocks, step):
        draw_text(axes, block + 0.5, rows + 0.28, str(block), ha="center", size=7.5, color=QUIET)
    label(figure, 0.05 / WIDTH, (below - 0.12) / height, "teacher block", size=7.5, color=QUIET)
    for interval in plan.intervals:
        top = -0.14 - 0.56 * levels[interval.name]
        axes.plot([interval.first + 0.12, interval.last + 0.88], [top, top], color=BLUE, lw=2, clip_on=False,
                  solid_capstyle="butt")
        middle = (interval.first + interval.last + 1) / 2
        draw_text(axes, middle, top - 0.32, _range(interval), ha="center", size=8.5, color=BLUE, weight="bold")
    _map_legend(figure, MAP_LEFT / WIDTH, 0.12 / height)
    return png_bytes(figure)


def _label_levels(intervals: list[Interval], blocks: int) -> dict[str, int]:
    """How high each interval's label stands, so that neighbours do not touch."""
    inches, ends, levels = (WIDTH - MAP_LEFT - MAP_RIGHT) / blocks, [], {}
    for interval in intervals:
        half = 0.06 + 0.042 * len(interval.name)
        middle = inches * (interval.first + interval.last + 1) / 2
        level = next((i for i, end in enumerate(ends) if end <= middle - half), len(ends))
        ends[level:level + 1] = [middle + half]
        levels[interval.name] = level
    return levels


def _map_row(axes, plan: PruningPlan, variant: Variant, row: int) -> None:
    from matplotlib.patches import Rectangle

    gap = 0.03 * plan.num_blocks / (WIDTH - MAP_LEFT - MAP_RIGHT)  # 0.03 inches, in blocks

    def cell(block, face, edge=None):
        size = {"width": 1 - gap, "height": 0.74, "facecolor": face, "edgecolor": edge or face, "lw": 0.9 if edge else 0}
        axes.add_patch(Rectangle((block + gap / 2, row + 0.13), **size, clip_on=False))

    inside = {block: interval for interval in plan.intervals for block in interval.blocks}
    for block in range(plan.num_blocks):
        interval = inside.get(block)
        if interval is None:
            cell(block, KEPT)
        elif interval.name not in variant.intervals:
            cell(block, RESTORED, ORANGE)
        elif block == interval.first:
            cell(block, BLUE)
        else:
            axes.plot([block - gap, block + 1 - gap], [row + 0.5] * 2, color=BLUE, lw=1.2, clip_on=False, solid_capstyle="butt")
            axes.plot([block + 0.5], [row + 0.5], "o", color="white", mec=BLUE, ms=min(4, 130 / plan.num_blocks), clip_on=False)


def _map_legend(figure, left: float, bottom: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=KEPT, label="teacher's block, kept"),
        Patch(facecolor=BLUE, label="student"),
        Line2D([], [], color=BLUE, lw=1.2, marker="o", mfc="white", ms=4, label="replaced by the student before it"),
        Patch(facecolor=RESTORED, edgecolor=ORANGE, label="interval switched back to the teacher"),
    ]
    legend = figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(left, bottom), ncols=4, frameon=False, fontsize=8.5,
        borderaxespad=0, borderpad=0, handlelength=1.6, columnspacing=2.2,
    )  # fmt: skip
    for entry in legend.get_texts():
        entry.set_color(INK)


def cka_curves(plan: PruningPlan, cka: torch.Tensor) -> bytes:
    """cka(u, k) from each interval's first block u, and its first difference D below. cka: see detect.Curves."""
    columns = min(3, len(plan.intervals))
    rows = math.ceil(len(plan.intervals) / columns)
    height = 2.75 * rows + 0.45
    figure = new_figure(height)
    grid = figure.add_gridspec(
        rows, columns, left=0.07, right=0.985, top=1 - 0.72 / height, bottom=0.5 / height, hspace=0.42, wspace=0.22,
    )  # fmt: skip
    for place, interval in enumerate(plan.intervals):
        inner = grid[place // columns, place % columns].subgridspec(2, 1, height_ratios=(1.7, 1), hspace=0.14)
        _cka_panel(figure.add_subplot(inner[0]), figure.add_subplot(inner[1]), interval, cka[interval.first], place % columns == 0)
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
    upper.set_title(f"Blocks {_range(interval)}", loc="left", fontsize=10, fontweight="bold", color=INK)
    drops = (rows[:-1, 0] - rows[1:, 0]).tolist()
    lower.axhline(0, color=QUIET, lw=0.7)
    upper.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
    lower.yaxis.set_major_locator(MaxNLocator(2, min_n_ticks=2))
    lower.bar(blocks[1:], drops, width=0.62, color=[BLUE if b <= interval.last else "#9BA8B4" for b in blocks[1:]])
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
        handles=handles, loc="upper left", bbox_to_anchor=(0.065, 1 - 0.08 / height), ncols=5, frameon=False,
        fontsize=8.5, borderaxespad=0, borderpad=0, handlelength=2, columnspacing=2,
    )  # fmt: skip
    for entry in legend.get_texts():
        entry.set_color(INK)


def damage_map(plan: PruningPlan, damage: torch.Tensor) -> bytes:
    """damage [blocks, longest]: of replacing [u, u + j]; column u, row by length. Chosen intervals are outlined."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.patches import Rectangle
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
    image = axes.pcolormesh(*corners, cells, cmap=colours, norm=LogNorm(low, max(high, 1.01 * low)), edgecolor="white", lw=0.8)
    reach = 1 + 0.06 * blocks  # cells that an outlined interval and its label cover
    for interval in plan.intervals:
        box = (interval.first - 0.5, interval.removed + 0.5)
        axes.add_patch(Rectangle(box, 1, 1, fill=False, edgecolor=VERMILION, lw=2.4, clip_on=False, zorder=4))
        crowded = any(i.removed == interval.removed and 0 < i.first - interval.first < reach for i in plan.intervals)
        beside = not crowded and interval.first < blocks - reach
        draw_text(axes, interval.first + (0.68 if beside else -0.68), interval.removed + 1, _range(interval), size=8, weight="bold",
              color=INK, ha="left" if beside else "right", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.9})
    axes.set_xticks(range(0, blocks, 1 if blocks <= 40 else 5))
    axes.set_yticks(range(2, longest + 1))
    axes.set_xlabel("first block of the interval, u", fontsize=9, color=QUIET)
    axes.set_ylabel("blocks in it", fontsize=9, color=QUIET)
    bar = figure.colorbar(image, cax=figure.add_axes((1 - 0.95 / WIDTH, 0.62 / height, 0.14 / WIDTH, share)))
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.tick_params(labelsize=8, colors=QUIET, length=0, which="both")
    bar.ax.set_title("damage", fontsize=8.5, color=QUIET, loc="left", pad=6)
    return png_bytes(figure)


def loss_curves(losses: dict[str, torch.Tensor]) -> bytes:
    """losses: interval name -> [updates]. Faint: each update; bold: running median."""
    from matplotlib import colormaps

    names = list(losses)
    shades = colormaps["viridis"]
    colours = LINES if len(names) <= len(LINES) else [shades(0.86 * i / (len(names) - 1)) for i in range(len(names))]
    figure = new_figure(max(3.9, 0.21 * len(names) + 0.6))
    axes = figure.add_axes((0.07, 0.54 / figure.get_figheight(), 0.84, 1 - 0.64 / figure.get_figheight()))
    tidy(axes)
    smoothed = {name: _running_mean(values) for name, values in losses.items()}
    for name, colour in zip(names, colours, strict=False):
        axes.plot(losses[name].numpy(), color=colour, lw=0.6, alpha=0.25 if len(names) <= len(LINES) else 0.1)
        axes.plot(smoothed[name].numpy(), color=colour, lw=2)
    logarithmic(axes)
    axes.set_xlim(0, max(max(len(values) for values in losses.values()) - 1, 1))
    axes.set_xlabel("update", fontsize=9, color=QUIET)
    axes.set_ylabel("loss", fontsize=9, color=QUIET)
    ends = {name: float(values[-1]) for name, values in smoothed.items()}
    _end_labels(axes, ends, {name: name.replace("-", "–") for name in names}, dict(zip(names, colours, strict=False)))
    return png_bytes(figure)


def _running_mean(values: torch.Tensor) -> torch.Tensor:
    """Geometric, over a twentieth of the curve."""
    reach = len(values) // 40
    logs = values.clamp_min(1e-12).log()
    padded = torch.cat([logs[1 : reach + 1].flip(0), logs, logs[-reach - 1 : -1].flip(0)])
    return padded.unfold(0, 2 * reach + 1, 1).mean(dim=1).exp()


def _end_labels(axes, ends: dict[str, float], labels: dict[str, str], colours: dict) -> None:
    """Names at the right of curves that end at `ends`, on a logarithmic axis."""
    low, high = (math.log10(y) for y in axes.get_ylim())
    names = sorted(ends, key=ends.get)
    gap = 0.2 / (axes.figure.get_figheight() * axes.get_position().height)
    heights = [max(0.0, (math.log10(max(ends[name], 1e-12)) - low) / (high - low)) for name in names]
    for name, height in zip(names, spread(heights, gap), strict=True):
        draw_text(axes, 1.012, height, labels[name], size=9.5, weight="bold", color=colours[name], transform=axes.transAxes)


def spread(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved as little as possible (least squares) until they are `gap` apart.

    Pool adjacent violators on height - i * gap (Ayer et al. 1955).
    """
    pools: list[list[float]] = []  # [mean, count]
    for place, height in enumerate(heights):
        pools.append([height - place * gap, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (m1, n1), (m2, n2) = pools[-2:]
            pools[-2:] = [[(m1 * n1 + m2 * n2) / (n1 + n2), n1 + n2]]
    even = [mean for mean, count in pools for _ in range(int(count))]
    return [mean + place * gap for place, mean in enumerate(even)]


def velocity_errors(rows: dict[str, list[dict]]) -> bytes:
    """rows: variant -> [{"t", "value", "low", "high"}]. Relative squared error of the velocity."""
    figure = new_figure(3.7)
    axes = figure.add_axes((0.07, 0.14, 0.8, 0.83))
    tidy(axes)
    for place, (name, points) in enumerate(rows.items()):
        colour, t = LINES[place % len(LINES)], [p["t"] for p in points]
        axes.fill_between(t, [p["low"] for p in points], [p["high"] for p in points], color=colour, alpha=0.16, lw=0)
        axes.plot(t, [p["value"] for p in points], color=colour, lw=2, marker=MARKERS[place % len(MARKERS)], ms=5,
                  clip_on=False)
    logarithmic(axes)
    axes.set_xlim(0, max((p[-1]["t"] for p in rows.values()), default=1.0))
    axes.set_xlabel("timestep t  (0: picture, 1: noise)", fontsize=9, color=QUIET)
    axes.set_ylabel("velocity error", fontsize=9, color=QUIET)
    colours = {name: LINES[place % len(LINES)] for place, name in enumerate(rows)}
    _end_labels(axes, {n: p[-1]["value"] for n, p in rows.items()}, {n: shortened(n, 18) for n in rows}, colours)
    return png_bytes(figure)


def picture_sheet(names: list[str], captions: list[str], pictures: dict[str, torch.Tensor]) -> bytes:
    """pictures: variant -> uint8 [captions, 3, height, width]. A row a variant, a column a caption."""
    high, wide = pictures[names[0]].shape[2:]
    cell = min((WIDTH - MAP_LEFT) / len(captions), 2.2)
    tall, letters = cell * high / wide, max(6, int(cell * 13))
    titles = [textwrap.wrap(drawable(c), letters, max_lines=7, placeholder="…") for c in captions]
    head = 0.18 + 0.128 * max(len(lines) for lines in titles)
    height = head + len(names) * tall
    figure = new_figure(height)
    for row, name in enumerate(names):
        bottom = height - head - (row + 1) * tall
        label(figure, 0.05 / WIDTH, (bottom + 0.5 * tall) / height, shortened(name, 16), weight="bold")
        for column, picture in enumerate(pictures[name][: len(captions)]):
            left = MAP_LEFT + column * cell
            axes = figure.add_axes((left / WIDTH, (bottom + 0.04 * tall) / height, 0.95 * cell / WIDTH, 0.95 * tall / height))
            axes.imshow(picture.movedim(0, -1).numpy(), interpolation="nearest" if wide < 128 else "auto")
            axes.axis("off")
    for column, lines in enumerate(titles):
        place = (MAP_LEFT + column * cell) / WIDTH, 1 - (head - 0.07) / height
        label(figure, *place, "\n".join(lines), va="bottom", size=7.5, color=QUIET)
    return png_bytes(figure)


def _range(interval: Interval) -> str:
    return f"{interval.first}–{interval.last}"
