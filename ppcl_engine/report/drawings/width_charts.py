"""Charts of width detection: how similar the layers are, and what each candidate site costs and
saves."""

from __future__ import annotations

import math
from collections import Counter

import torch

from ...plan import TextGroup, WidthSite
from ...system.numbers import count_text
from .canvas import (
    DAMAGE_COLOURS,
    INK,
    QUIET,
    RULE,
    SITE_MARKS,
    SITE_NAMES,
    VERMILION,
    WIDTH,
    draw_text,
    new_figure,
    png_bytes,
    spread,
    tidy,
)

FAINT = "#8FA3B5"
BOTTOM, TOP = 0.72, 0.42  # inches below and above the heat map
NAME_HEIGHT = 0.19  # inches for the name of a candidate
LEFT, SIDE = 0.75, 5.1  # of the heat map, inches


def alignment_map(
    places: list[str], alignment: dict[str, torch.Tensor], chosen: list[WidthSite | TextGroup]
) -> bytes:
    """A PNG: `text` [places, places] as a heat map, each kind of FFN [places] beside its rows, all on
    one scale of 1 - CKA. NaN: that place has no such part."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    unlike = {name: (1 - values.double()).clamp_min(1e-5) for name, values in alignment.items()}
    off_diagonal = unlike["text"][~torch.eye(len(places), dtype=torch.bool)]
    kinds = [kind for kind in SITE_NAMES if kind in unlike and kind != "text"]
    low, high = _decades(torch.cat([off_diagonal, *(unlike[kind] for kind in kinds)]))
    side = min(SIDE, max(2.6, 0.34 * len(places)))
    height = side + BOTTOM + TOP
    figure, share = new_figure(height), (BOTTOM / height, side / height)
    axes = figure.add_axes((LEFT / WIDTH, share[0], side / WIDTH, share[1]))
    colours = LinearSegmentedColormap.from_list("damage", DAMAGE_COLOURS)
    corners = [x - 0.5 for x in range(len(places) + 1)]
    image = axes.pcolormesh(
        corners,
        corners,
        unlike["text"].clamp_min(low).numpy(),
        cmap=colours,
        norm=LogNorm(low, high),
        edgecolor="white",
        lw=0.5 if len(places) <= 40 else 0.2,
    )
    _place_axes(axes, places, side)
    _outlines(axes, places, [s for s in chosen if isinstance(s, TextGroup)])
    axes.set_title(
        "modulated text: CKA of every two layers",
        loc="left",
        fontsize=10,
        fontweight="bold",
        color=INK,
    )
    box = (LEFT + side + 0.14) / WIDTH
    _colour_bar(figure, image, (box, share[0], 0.13 / WIDTH, share[1]), low, high)
    start, apart = LEFT + side + 1.35, 0.22
    wide = (WIDTH - start - 0.25 - apart * (len(kinds) - 1)) / len(kinds)
    for number, kind in enumerate(kinds):
        strip = figure.add_axes(
            ((start + number * (wide + apart)) / WIDTH, share[0], wide / WIDTH, share[1])
        )
        on = [s.block for s in chosen if isinstance(s, WidthSite) and s.kind == kind]
        _strip(strip, places, unlike[kind].clamp_min(low), kind, on, side)
        strip.set_xlim(1.5 * high, low / 1.5)
        strip.tick_params(labelleft=number == 0)
    return png_bytes(figure)


def _colour_bar(figure, image, box: tuple[float, ...], low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    bar = figure.colorbar(image, cax=figure.add_axes(box))
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(FixedLocator([x for x in _ticks() if low <= x <= high]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(_cka_text))
    bar.ax.tick_params(labelsize=8, colors=QUIET, length=0, which="both")


def _decades(values: torch.Tensor) -> tuple[float, float]:
    """(lowest, highest) value of the scale, at least a decade apart."""
    values = values[values.isfinite()]
    low, high = float(values.min()), float(values.max())
    return min(low, high / 10), high


def _ticks() -> list[float]:
    return [step * 10.0**power for power in range(-5, 1) for step in (1, 2, 5)]


def _cka_text(value: float, _=None) -> str:
    return "0" if value == 1 else f"{1 - value:.{max(1, math.ceil(-math.log10(value) - 1e-9))}f}"


def _place_axes(axes, places: list[str], side: float) -> None:
    """Writes the names of the places on both sides, as many as are legible."""
    tidy(axes, grid=False)
    step = math.ceil(0.16 * len(places) / side)
    marks, names = range(0, len(places), step), [name.replace("-", "–") for name in places[::step]]
    longest = max(len(name) for name in names)
    crowded = 0.075 * longest * len(places) / step > side
    axes.set_xticks(marks, names, fontsize=7.5, rotation=90 if crowded else 0)
    axes.set_yticks(marks, names, fontsize=7.5)
    axes.set_ylim(len(places) - 0.5, -0.5)


def _outlines(axes, places: list[str], groups: list[TextGroup]) -> None:
    """Draws a square around each group and the full block that it reads from."""
    from matplotlib.patches import Rectangle

    starts = [int(name.split("-")[0]) for name in places]
    for group in groups:
        inside = [
            number for number, start in enumerate(starts) if group.first <= start <= group.last
        ]
        if not inside:
            continue
        first, size = inside[0] - 1.5, len(inside) + 1
        axes.add_patch(
            Rectangle(
                (first, first),
                size,
                size,
                fill=False,
                ec=VERMILION,
                lw=2.2,
                clip_on=False,
                zorder=4,
            )
        )


def _strip(
    axes, places: list[str], unlike: torch.Tensor, kind: str, chosen: list[int], side: float
) -> None:
    """Draws a dot for each place; those of the chosen sites stand out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    starts = [int(name.split("-")[0]) for name in places]
    axes.set_xscale("log")
    _place_axes(axes, places, side)
    axes.set_title(SITE_NAMES[kind], loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.grid(axis="y", color=RULE, lw=0.6)
    for row, (start, value) in enumerate(zip(starts, unlike.tolist(), strict=True)):
        style = {"color": VERMILION, "ms": 6.5} if start in chosen else {"color": FAINT, "ms": 4}
        axes.plot([value], [row], SITE_MARKS[kind], clip_on=False, zorder=3, **style)
    axes.xaxis.set_major_locator(LogLocator(numticks=4))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_cka_text))
    axes.tick_params(axis="x", labelsize=8, rotation=0)
    axes.set_xlabel("CKA across it", fontsize=8.5, color=QUIET)


def candidate_chart(candidates: list[dict], score: str) -> bytes:
    """A PNG: score against parameters saved, both logarithmic; the chosen candidates are named.

    candidates: as width.json has them; score: what it measures, in words.
    """
    least = min((c["score"] for c in candidates if c["score"] > 0), default=1e-6)
    rows = [
        {**c, "score": max(c["score"], least), "kind": c["name"].split(":")[0]} for c in candidates
    ]
    chosen = [row for row in rows if row["chosen"]]
    column = max(Counter(row["saving"] for row in chosen).values(), default=0)
    height = max(4.1, NAME_HEIGHT * column + 1.4)
    figure = new_figure(height)
    axes = figure.add_axes((0.075, 0.52 / height, 0.905, 1 - 0.92 / height))
    tidy(axes)
    axes.grid(axis="x", color=RULE, lw=0.7)
    for some, style in (
        ([r for r in rows if not r["chosen"]], {"color": FAINT, "alpha": 0.55, "ms": 4}),
        (chosen, {"color": VERMILION, "mec": "white", "mew": 0.6, "ms": 7.5, "zorder": 4}),
    ):
        for kind, mark in SITE_MARKS.items():
            points = [(r["saving"], r["score"]) for r in some if r["kind"] == kind]
            axes.plot([p[0] for p in points], [p[1] for p in points], mark, lw=0, **style)
    _scales(axes, rows)
    _cut(axes, chosen)
    _name_chosen(axes, chosen)
    axes.set_xlabel("parameters saved", fontsize=9, color=QUIET)
    axes.set_ylabel(score, fontsize=9, color=QUIET)
    _candidate_legend(figure, {row["kind"] for row in rows}, bool(chosen))
    return png_bytes(figure)


def _scales(axes, rows: list[dict]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    savings, scores = [r["saving"] for r in rows], [r["score"] for r in rows]
    room = (max(savings) / min(savings)) ** 0.12  # for names at the right
    axes.set(xscale="log", yscale="log", xlim=(min(savings) / 1.25, max(savings) * 1.25 * room))
    axes.set_ylim(min(scores) / 1.8, max(scores) * 1.8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1,) if max(scores) / min(scores) > 30 else (1, 2, 5), numticks=20)
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _cut(axes, chosen: list[dict]) -> None:
    """Draws the highest score per saved parameter among the chosen."""
    if chosen:
        worst, ends = max(r["score"] / r["saving"] for r in chosen), axes.get_xlim()
        axes.plot(
            ends,
            [worst * x for x in ends],
            color=QUIET,
            lw=1,
            ls=(0, (4, 3)),
            scalex=False,
            scaley=False,
        )


def _name_chosen(axes, chosen: list[dict]) -> None:
    """Writes names beside the points, spread where points save about the same."""
    gap = NAME_HEIGHT / (axes.figure.get_figheight() * axes.get_position().height)
    pixels = axes.transAxes.inverted()
    at = {
        r["name"]: pixels.transform(axes.transData.transform((r["saving"], r["score"])))
        for r in chosen
    }
    columns: list[list[str]] = []
    for name in sorted(at, key=lambda n: at[n][0]):
        if columns and at[name][0] - at[columns[-1][0]][0] < 0.09:
            columns[-1].append(name)
        else:
            columns.append([name])
    for column in columns:
        column.sort(key=lambda n: at[n][1])
        left = max(at[n][0] for n in column) + 0.018
        spaced = spread([at[n][1] for n in column], gap)
        heights = [max(height, (0.5 + row) * gap) for row, height in enumerate(spaced)]
        for name, height in zip(column, heights, strict=True):
            axes.plot(
                [at[name][0], left],
                [at[name][1], height],
                color=VERMILION,
                lw=0.6,
                transform=axes.transAxes,
            )
            draw_text(
                axes,
                left + 0.003,
                height,
                name.replace("-", "–"),
                size=8,
                transform=axes.transAxes,
                zorder=6,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.75},
            )


def _candidate_legend(figure, kinds: set[str], chosen: bool) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], lw=0, color=FAINT, marker=SITE_MARKS[kind], ms=5, label=SITE_NAMES[kind])
        for kind in SITE_NAMES
        if kind in kinds
    ]
    taken = Line2D([], [], lw=0, color=VERMILION, marker="o", ms=6, label="chosen")
    cut = Line2D(
        [],
        [],
        color=QUIET,
        lw=1,
        ls=(0, (4, 3)),
        label="same score per parameter as the costliest chosen",
    )
    legend = figure.legend(
        handles=[*marks, *([taken, cut] if chosen else [])],
        loc="upper left",
        bbox_to_anchor=(0.07, 0.985),
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
