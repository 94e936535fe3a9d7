"""The layer map: which blocks, students and projections each variant of a plan has.

The colours are Okabe and Ito's (2008), which colour-blind readers can tell apart.
"""

from __future__ import annotations

from ...models.layout import Layout, Place, layout_of
from ...plan import Interval, PruningPlan, Variant
from ...system.numbers import count_text
from .canvas import (
    BLUE,
    INK,
    KEPT,
    ORANGE,
    QUIET,
    RESTORED,
    SITE_MARKS,
    SITE_NAMES,
    VERMILION,
    WIDTH,
    draw_text,
    label,
    new_figure,
    png_bytes,
    range_text,
    shortened,
)

MAP_LEFT, MAP_RIGHT = 1.3, 1.45  # inches for names and for parameters


def layer_map(
    plan: PruningPlan, variants: list[Variant], parameters: dict[str, int], teacher: int
) -> bytes:
    """A PNG: a row for each variant, a cell for each teacher block, parameters at the right.
    `teacher`: its parameters.

    A row shows what is really on (layout.layout_of): a site that an interval switched off is not drawn.
    """
    blocks, rows = plan.num_blocks, len(variants)
    layouts = [layout_of(plan, variant) for variant in variants]
    kinds = [
        kind
        for kind in SITE_NAMES
        if any(kind in p.projections for layout in layouts for p in layout.places)
    ]
    levels = _label_levels(sorted(plan.intervals, key=lambda i: i.first), blocks)
    above, below = 0.45 + 0.24 * max(levels.values(), default=0), 1.02 if kinds else 0.78
    height = above + 0.42 * rows + below
    figure = new_figure(height)
    axes = figure.add_axes(
        (MAP_LEFT / WIDTH, below / height, 1 - (MAP_LEFT + MAP_RIGHT) / WIDTH, 0.42 * rows / height)
    )
    axes.set(xlim=(0, blocks), ylim=(rows, 0))
    axes.axis("off")
    for row, (variant, layout) in enumerate(zip(variants, layouts, strict=True)):
        _map_row(axes, plan, layout, row)
        middle = (below + 0.42 * (rows - row - 0.5)) / height
        label(figure, 0.05 / WIDTH, middle, shortened(variant.name, 16), weight="bold")
        count = parameters.get(variant.name)
        if count:
            label(figure, 1 - 0.72 / WIDTH, middle, count_text(count), ha="right", size=10)
            label(
                figure,
                1 - 0.05 / WIDTH,
                middle,
                f"{100 * count / teacher:.1f} %",
                ha="right",
                color=QUIET,
            )
    step = 1 if blocks <= 40 else 5
    for block in range(0, blocks, step):
        draw_text(axes, block + 0.5, rows + 0.28, str(block), ha="center", size=7.5, color=QUIET)
    label(figure, 0.05 / WIDTH, (below - 0.12) / height, "teacher block", size=7.5, color=QUIET)
    for interval in plan.intervals:
        _map_heading(axes, interval, levels[interval.name])
    _map_legend(figure, kinds, height)
    return png_bytes(figure)


def _map_heading(axes, interval: Interval, level: int) -> None:
    top, ends = -0.14 - 0.56 * level, [interval.first + 0.12, interval.last + 0.88]
    axes.plot(ends, [top, top], color=BLUE, lw=2, clip_on=False, solid_capstyle="butt")
    draw_text(
        axes,
        sum(ends) / 2,
        top - 0.32,
        range_text(interval),
        ha="center",
        size=8.5,
        color=BLUE,
        weight="bold",
    )


def _label_levels(intervals: list[Interval], blocks: int) -> dict[str, int]:
    """Interval -> level of its label, so that the labels of neighbours do not touch."""
    inches, ends, levels = (WIDTH - MAP_LEFT - MAP_RIGHT) / blocks, [], {}
    for interval in intervals:
        half = 0.06 + 0.042 * len(interval.name)
        middle = inches * (interval.first + interval.last + 1) / 2
        level = next((i for i, end in enumerate(ends) if end <= middle - half), len(ends))
        ends[level : level + 1] = [middle + half]
        levels[interval.name] = level
    return levels


def _map_row(axes, plan: PruningPlan, layout: Layout, row: int) -> None:
    inside = {block for interval in plan.intervals for block in interval.blocks}
    for place in layout.places:
        if place.interval is None:
            restored = place.index in inside
            _map_cell(
                axes,
                plan,
                place.index,
                row,
                RESTORED if restored else KEPT,
                ORANGE if restored else None,
            )
        else:
            _map_cell(axes, plan, place.index, row, BLUE)
            for block in place.interval.blocks[1:]:
                _map_gap(axes, plan, block, row)
    _map_sites(axes, plan, layout.places, row)


def _gap(plan: PruningPlan) -> float:
    """0.03 inches, in blocks."""
    return 0.03 * plan.num_blocks / (WIDTH - MAP_LEFT - MAP_RIGHT)


def _map_cell(
    axes, plan: PruningPlan, block: int, row: int, face: str, edge: str | None = None
) -> None:
    from matplotlib.patches import Rectangle

    style = {
        "facecolor": face,
        "edgecolor": edge or face,
        "lw": 0.9 if edge else 0,
        "clip_on": False,
    }
    axes.add_patch(Rectangle((block + _gap(plan) / 2, row + 0.13), 1 - _gap(plan), 0.74, **style))


def _map_gap(axes, plan: PruningPlan, block: int, row: int) -> None:
    """Draws a block that the student before it replaces."""
    ends, size = [block - _gap(plan), block + 1 - _gap(plan)], min(4, 130 / plan.num_blocks)
    axes.plot(ends, [row + 0.5] * 2, color=BLUE, lw=1.2, clip_on=False, solid_capstyle="butt")
    axes.plot([block + 0.5], [row + 0.5], "o", color="white", mec=BLUE, ms=size, clip_on=False)


def _map_sites(axes, plan: PruningPlan, places: tuple[Place, ...], row: int) -> None:
    """Draws a band over each text group and a mark for each FFN; text above, image below."""
    from matplotlib.patches import Rectangle

    groups: dict[int, list[Place]] = {}
    for place in places:
        if place.text_source is not None:
            groups.setdefault(place.text_source, []).append(place)
        for site in place.ffn:
            height = row + {"ffn_text": 0.33, "ffn_joint": 0.5}.get(site.kind, 0.68)
            mark = {
                "marker": SITE_MARKS[site.kind],
                "ms": min(6.5, 290 / plan.num_blocks),
                "zorder": 5,
            }
            axes.plot(
                [place.index + 0.5],
                [height],
                color=INK,
                mec="white",
                mew=0.7,
                clip_on=False,
                **mark,
            )
    for group in groups.values():
        left, right = group[0].index + _gap(plan) / 2, group[-1].last + 1 - _gap(plan) / 2
        style = {
            "facecolor": VERMILION,
            "edgecolor": "white",
            "lw": 0.9,
            "zorder": 4,
            "clip_on": False,
        }
        axes.add_patch(Rectangle((left, row + 0.12), right - left, 0.24, **style))


def _legend_handles(kinds: list[str]) -> tuple[list, list]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    blocks = [
        Patch(facecolor=KEPT, label="teacher's block, kept"),
        Patch(facecolor=BLUE, label="student"),
        Line2D(
            [],
            [],
            color=BLUE,
            lw=1.2,
            marker="o",
            mfc="white",
            ms=4,
            label="replaced by the student before it",
        ),
        Patch(facecolor=RESTORED, edgecolor=ORANGE, label="interval switched back to the teacher"),
    ]
    projected = [
        Line2D(
            [],
            [],
            color=VERMILION,
            lw=4,
            label=f"{SITE_NAMES[kind]} projected (a group is one switch)",
        )
        if kind == "text"
        else Line2D(
            [],
            [],
            color=INK,
            lw=0,
            marker=SITE_MARKS[kind],
            ms=5.5,
            label=f"{SITE_NAMES[kind]} projected",
        )
        for kind in kinds
    ]
    return blocks, projected


def _map_legend(figure, kinds: list[str], height: float) -> None:
    """Blocks in one line, the kinds of width sites that are on in any variant in another."""
    blocks, projected = _legend_handles(kinds)
    for handles, bottom in ((blocks, 0.36 if kinds else 0.12), (projected, 0.12)):
        legend = figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(MAP_LEFT / WIDTH, bottom / height),
            ncols=4,
            frameon=False,
            fontsize=8.5,
            borderaxespad=0,
            borderpad=0,
            handlelength=1.6,
            columnspacing=2.2,
        )
        for entry in legend.get_texts():
            entry.set_color(INK)
