"""The drawing of the ablation: a panel a table, a row a method."""

from __future__ import annotations

from ppcl_engine.report.drawings.canvas import (
    BLUE,
    INK,
    QUIET,
    RULE,
    new_figure,
    png_bytes,
    shortened,
    tidy,
)


def ablation_chart(tables: dict[str, list[dict]]) -> bytes:
    """tables: title -> rows {"name", "drop_percent", "low", "high"} in their order. One panel a
    table, one scale; names that begin with "ours" stand out."""
    rows = [row for table in tables.values() for row in table]
    least, most = min(0.0, *(row["low"] for row in rows)), max(1.0, *(row["high"] for row in rows))
    heights = [0.31 * len(table) for table in tables.values()]
    height = sum(heights) + 0.5 * len(tables) + 0.5
    figure, top = new_figure(height), height
    for number, (title, table) in enumerate(tables.items()):
        bottom = top - 0.5 - heights[number]
        axes = figure.add_axes((0.22, bottom / height, 0.75, heights[number] / height))
        axes.set(
            xlim=(least - 0.01 * (most - least), most + 0.09 * (most - least)),
            ylim=(len(table) - 0.5, -0.5),
        )
        _drop_panel(axes, title, table, last=number == len(tables) - 1)
        top = bottom
    return png_bytes(figure)


def _drop_panel(axes, title: str, rows: list[dict], last: bool) -> None:
    tidy(axes, grid=False)
    axes.grid(axis="x", color=RULE, lw=0.7)
    axes.tick_params(labelbottom=last)
    axes.set_yticks([])
    axes.axvline(0, color=QUIET, lw=0.9)
    axes.text(
        -0.28,
        -0.78,
        title.replace("_", " "),
        transform=axes.get_yaxis_transform(),
        size=10.5,
        color=INK,
        weight="bold",
        va="bottom",
        parse_math=False,
    )
    for place, row in enumerate(rows):
        ours, drop = row["name"].startswith("ours"), row["drop_percent"]
        axes.barh(place, drop, height=0.62, color=BLUE if ours else "#B4BFC9", zorder=2)
        axes.plot(
            [row["low"], row["high"]], [place, place], color=INK, lw=1.3, marker="|", ms=6, zorder=3
        )
        text = {"weight": "bold" if ours else "normal", "parse_math": False, "va": "center"}
        name, side = shortened(row["name"].replace("_", " "), 27), axes.get_yaxis_transform()
        axes.text(
            -0.015,
            place,
            name,
            transform=side,
            ha="right",
            size=9.5,
            color=BLUE if ours else INK,
            **text,
        )
        value = f"{drop:.{1 if abs(drop) >= 10 else 2}f} %".replace("-", "−")
        at = {"xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(value, (max(row["high"], drop, 0), place), size=9, color=INK, **at, **text)
    if last:
        axes.set_xlabel("drop against the teacher, %  (0: no loss)", fontsize=9, color=QUIET)
