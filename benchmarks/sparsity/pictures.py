"""Velocity error and characters read against the bytes of a file, by method."""

from __future__ import annotations

from pathlib import Path

from ppcl_engine.report.drawings.canvas import INK, LINES, MARKERS, new_figure, png_bytes, tidy
from ppcl_engine.system.atomic import replacing

SHOWN = (
    "magnitude row",
    "wanda row",
    "ria row",
    "obs layer",
    "energy cluster",
    "energy cluster + exchange + compensate",
)
VARIANTS = "PPCL variants"


def draw(values: dict, path: Path) -> None:
    figure = new_figure(4.2)
    grid = figure.add_gridspec(1, 2, left=0.07, right=0.985, top=0.84, bottom=0.14, wspace=0.2)
    panels = [figure.add_subplot(grid[0]), figure.add_subplot(grid[1])]
    for axes, (name, scale, said) in zip(
        panels,
        (("velocity_error", 1, "velocity error"), ("characters", 100, "characters read, %")),
        strict=True,
    ):
        tidy(axes)
        for number, (label, points) in enumerate(_lines(values["tables"]).items()):
            _line(axes, [(row["bytes"] / 1e6, row[name]) for row in points], scale, number, label)
        axes.set_xlabel("MB of the file (16 bits, zeros stored as a bitmap)")
        axes.set_title(said, loc="left", fontsize=10)
    panels[0].set_yscale("log")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="upper center",
        ncols=4,
        frameon=False,
        fontsize=8,
    )
    with replacing(path) as temporary:
        temporary.write_bytes(png_bytes(figure))


def _line(axes, points: list[tuple[float, dict]], scale: float, number: int, label: str) -> None:
    sizes, found = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    middle = [scale * value["value"] for value in found]
    below, above = ([scale * abs(v["value"] - v[end]) for v in found] for end in ("low", "high"))
    colour = INK if label == VARIANTS else LINES[number % len(LINES)]
    style = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
    dashes = "--" if label == VARIANTS else "-"
    axes.errorbar(
        sizes,
        middle,
        [below, above],
        label=label,
        linewidth=1.4,
        linestyle=dashes,
        capsize=2,
        **style,
    )


def _lines(tables: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """By method, the rows of all shares; PPCL's own variants (of which the full one has no error)
    as one more."""
    found = {
        name: [
            row for table in tables if "%" in table for row in tables[table] if row["name"] == name
        ]
        for name in SHOWN
    }
    variants = [
        row
        for row in tables.get("variants", [])
        if "," not in row["name"] and row["velocity_error"]["value"] > 0
    ]
    return {name: rows for name, rows in {**found, VARIANTS: variants}.items() if rows}
