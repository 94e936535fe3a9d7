"""Where a LoRA's energy is: a bar a block, by what became of the block."""

from __future__ import annotations

from collections.abc import Sequence

from ...algorithms.lora.energies import OUTSIDE, BlockEnergy
from .canvas import (
    BLUE,
    INK,
    ORANGE,
    QUIET,
    VERMILION,
    draw_text,
    drawable,
    new_figure,
    png_bytes,
    tidy,
)

PARTS = (
    ("reached", BLUE, "reaches the model"),
    ("projected", ORANGE, "part was projected"),
    ("removed", VERMILION, "block was removed"),
)
HEIGHT, WORDS = 3.0, 10  # inches; blocks between two numbers, at most so many numbers


def lora_map(title: str, rows: Sequence[BlockEnergy], num_blocks: int) -> bytes:
    """A PNG: share of the LoRA's energy in every block, stacked by its fate; what is outside of all
    blocks at the left."""
    total = sum(row.total for row in rows) or 1.0
    figure = new_figure(HEIGHT)
    axes = figure.add_axes((0.07, 0.2, 0.9, 0.56))
    floor = dict.fromkeys((row.block for row in rows), 0.0)
    for part, colour, words in PARTS:
        shares = {row.block: 100 * getattr(row, part) / total for row in rows}
        axes.bar(
            list(shares),
            list(shares.values()),
            bottom=[floor[block] for block in shares],
            color=colour,
            width=0.82,
            label=f"{words}: {sum(shares.values()):.0f} %",
        )
        floor = {block: floor[block] + share for block, share in shares.items()}
    axes.set_xlim(OUTSIDE - 0.6, num_blocks - 0.4)
    step = max(1, num_blocks // WORDS)
    numbers = list(range(0, num_blocks, step))
    axes.set_xticks([OUTSIDE, *numbers], ["outside", *map(str, numbers)])
    axes.set_ylabel("% of the energy", size=8.5, color=QUIET)
    axes.set_xlabel("block of the full model", size=8.5, color=QUIET)
    tidy(axes)
    draw_text(axes, 0, 1.3, drawable(title), transform=axes.transAxes, size=11)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.005, 1.0),
        ncols=len(PARTS),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    return png_bytes(figure)
