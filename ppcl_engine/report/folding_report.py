"""The report of `ppcl fold`: bytes and parameters before and after and, for a basis, the error against
its rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..models.folding.basis import Curve
from ..models.folding.reading import Original
from ..settings.convert_settings import FoldConfig
from ..system.atomic import replacing, write_json, write_text
from ..system.numbers import bytes_text
from ..system.tensor_files import TensorFile
from .drawings.canvas import (
    BLUE,
    INK,
    QUIET,
    VERMILION,
    draw_text,
    logarithmic,
    new_figure,
    png_bytes,
    spread,
    tidy,
)
from .html import Html, image, joined, table, tag
from .texts import STYLE

BF16_ROUNDING = 2**-8  # largest relative error of rounding a number to bfloat16
CURVE_TEXT = (
    "Largest and mean relative error of a modulation, |y_rank(t) − y(t)| / |y(t)|, over all modulations and over timesteps "
    "between those that the basis was made from, in float32 and in bfloat16. The basis of rank r is the mean and the r "
    "leading directions of silu(time embedding)."
)
SIZE_TEXT = "Contents of the files. A modulation is a block's map from the timestep to shifts, scales and gates."


@dataclass(frozen=True)
class Size:
    """Size of one file before and after folding."""

    name: str
    parameters: int
    """before"""
    folded_parameters: int
    """after"""
    bytes: int
    """before"""
    folded_bytes: int
    """after"""
    modulations: int
    """how many of the parameters before are the modulations'"""


def size_of(original: Original, written: Path) -> Size:
    folded = TensorFile(written)
    before = [
        (math.prod(file.shape(stored_name)), file.dtype(stored_name))
        for file, stored_name in original.stored.values()
    ]
    after = [
        (math.prod(folded.shape(name)), folded.dtype(name))
        for name in folded.keys()
        if not _is_mark(name)
    ]
    modulations = sum(
        math.prod(original.shape(f"{n}.{leaf}"))
        for n in original.modulations
        for leaf in ("weight", "bias")
    )
    return Size(
        name=written.name,
        parameters=sum(count for count, _ in before),
        folded_parameters=sum(count for count, _ in after),
        bytes=sum(count * dtype.itemsize for count, dtype in before),
        folded_bytes=sum(count * dtype.itemsize for count, dtype in after),
        modulations=modulations,
    )


def _is_mark(name: str) -> bool:
    return name.split(".")[-1].startswith("ppcl_")


def write_report(config: FoldConfig, sizes: list[Size], measured: dict) -> Path:
    """Writes `<name>.json`, `<name>.html` and, for a basis, `<name>.png` to the run folder, and returns
    the page. measured: what the stage measured."""
    curve: Curve | None = measured.get("curve")
    values = {key: value for key, value in measured.items() if key != "curve"} | (
        curve.to_json() if curve else {}
    )
    write_json(
        config.run / f"{config.name}.json", {**values, "sizes": [vars(size) for size in sizes]}
    )
    drawing = b""
    if curve:
        drawing = error_against_rank(curve, measured["rank"], measured["bound"])
        with replacing(config.run / f"{config.name}.png") as temporary:
            temporary.write_bytes(drawing)
    page = config.run / f"{config.name}.html"
    write_text(page, _page(config, sizes, measured, drawing))
    return page


def _page(config: FoldConfig, sizes: list[Size], measured: dict, drawing: bytes) -> str:
    body = [
        tag(
            "header",
            tag("p", "PPCL folding report", class_="eyebrow"),
            tag("h1", config.name),
            tag("p", lead(sizes, measured), class_="lead"),
        ),
        tag("section", tag("h2", "Size"), tag("p", SIZE_TEXT), _size_table(sizes)),
    ]
    if drawing:
        picture = tag("div", image(drawing, "error against rank", class_="wide"), class_="scroll")
        body.append(
            tag(
                "section",
                tag("h2", "Error against rank"),
                tag("p", CURVE_TEXT),
                picture,
                _curve_table(measured["curve"]),
            )
        )
    head = joined(
        (
            tag("meta", charset="utf-8"),
            tag("title", f"folding of {config.name}"),
            tag("style", Html(STYLE)),
        )
    )
    return "<!doctype html>\n" + tag(
        "html", tag("head", head), tag("body", tag("main", *body)), lang="en"
    )


def lead(sizes: list[Size], measured: dict) -> str:
    """The result in one line."""
    before, after = (
        sum(getattr(size, name) for size in sizes) for name in ("parameters", "folded_parameters")
    )
    saved = f"{before:,} -> {after:,} parameters ({100 * (1 - after / before):.1f} % less)"
    if "curve" in measured:
        curve, rank = measured["curve"], measured["rank"]
        index = curve.ranks.index(rank)
        mean, worst = float(curve.mean[index]), float(curve.worst[index])
        return f"basis of rank {rank}: {saved}; error {100 * mean:.2f} % mean, {100 * worst:.2f} % worst"
    count, size = len(measured["timesteps"]), bytes_text(measured["table_bytes"])
    return f"table of {count} timesteps, {size}: {saved}; the model's own values, no error"


def _size_table(sizes: list[Size]) -> Html:
    heads = ["file", "parameters", "folded", "of them modulations", "size", "folded size"]
    rows: list[list[object]] = [
        [
            s.name,
            f"{s.parameters:,}",
            f"{s.folded_parameters:,}",
            f"{s.modulations:,}",
            bytes_text(s.bytes),
            bytes_text(s.folded_bytes),
        ]
        for s in sizes
    ]
    return table(heads, rows)


def _curve_table(curve: Curve) -> Html:
    rows = zip(curve.ranks, curve.mean.tolist(), curve.worst.tolist(), strict=True)
    return table(
        ["rank", "mean error", "worst error", "worst in"],
        [
            [rank, f"{100 * mean:.2f} %", f"{100 * worst:.2f} %", curve.worst_part(rank)]
            for rank, mean, worst in rows
        ],
    )


def error_against_rank(curve: Curve, rank: int, bound: float) -> bytes:
    """A PNG. Faint: each modulation at its worst timestep; bold: the worst and the mean of all."""
    figure = new_figure(4.2)
    axes = figure.add_axes((0.08, 0.13, 0.76, 0.83))
    tidy(axes)
    for _, worst in curve.by_part.values():
        axes.plot(curve.ranks, worst.tolist(), color=VERMILION, lw=0.5, alpha=0.18)
    axes.plot(
        curve.ranks, curve.worst.tolist(), color=VERMILION, lw=2.2, marker="o", ms=5, clip_on=False
    )
    axes.plot(
        curve.ranks, curve.mean.tolist(), color=BLUE, lw=2.2, marker="s", ms=4.5, clip_on=False
    )
    axes.set_xscale("log", base=2)
    logarithmic(axes)
    axes.set_xticks(curve.ranks, [str(r) for r in curve.ranks])
    axes.minorticks_off()
    axes.axhline(bound, color=INK, lw=1, ls=(0, (4, 2)))
    axes.axhline(BF16_ROUNDING, color=QUIET, lw=1, ls=(0, (1, 2)))
    axes.axvline(rank, color=INK, lw=1)
    side = axes.get_yaxis_transform()
    labels = {
        "worst of all": (float(curve.worst[-1]), VERMILION),
        "mean": (float(curve.mean[-1]), BLUE),
        f"bound {bound:g}": (bound, INK),
        "bf16 itself rounds": (BF16_ROUNDING, QUIET),
    }
    for text, (height, colour) in _apart(labels, axes).items():
        draw_text(axes, 1.02, height, text, size=9, color=colour, transform=side)
    draw_text(
        axes, rank, 1.0, f" rank {rank}", size=9, va="top", transform=axes.get_xaxis_transform()
    )
    axes.set_xlabel("rank: directions beside the mean", fontsize=9, color=QUIET)
    axes.set_ylabel("relative error of a modulation", fontsize=9, color=QUIET)
    return png_bytes(figure)


def _apart(labels: dict[str, tuple[float, str]], axes) -> dict[str, tuple[float, str]]:
    """Heights on the logarithmic axis, moved until no two labels touch."""
    low, high = (math.log10(y) for y in axes.get_ylim())
    names = sorted(labels, key=lambda name: labels[name][0])
    gap = (high - low) * 0.17 / (axes.figure.get_figheight() * axes.get_position().height)
    heights = spread([math.log10(labels[name][0]) for name in names], gap)
    return {
        name: (10**height, labels[name][1]) for name, height in zip(names, heights, strict=True)
    }


def printed(page: Path, sizes: list[Size], measured: dict) -> str:
    """What the stage prints at its end."""
    rows = [f"{lead(sizes, measured)}; report: {page}"]
    if "curve" in measured:
        rows += ["rank  mean %  worst %"]
        rows += [
            f"{r['rank']:4d}  {100 * r['mean']:6.2f}  {100 * r['worst']:7.2f}"
            for r in measured["curve"].to_json()["curve"]
        ]
    return "\n".join(rows)
