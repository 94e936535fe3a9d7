"""A sheet of pictures: a row for each variant, a column for each caption."""

from __future__ import annotations

import textwrap

import torch

from .canvas import (
    QUIET,
    WIDTH,
    drawable,
    label,
    new_figure,
    png_bytes,
    shortened,
)

NAMES_WIDTH = 1.3  # inches, left of the pictures


def picture_sheet(
    names: list[str], captions: list[str], pictures: dict[str, torch.Tensor]
) -> bytes:
    """A PNG. pictures: variant -> uint8 [captions, 3, height, width]."""
    high, wide = pictures[names[0]].shape[2:]
    cell = min((WIDTH - NAMES_WIDTH) / len(captions), 2.2)
    tall, letters = cell * high / wide, max(6, int(cell * 13))
    titles = [
        textwrap.wrap(drawable(c), max(letters, 10), max_lines=7, placeholder="…") for c in captions
    ]
    head = 0.18 + 0.128 * max(len(lines) for lines in titles)
    height = head + len(names) * tall
    figure = new_figure(height)
    for row, name in enumerate(names):
        bottom = height - head - (row + 1) * tall
        label(
            figure, 0.05 / WIDTH, (bottom + 0.5 * tall) / height, shortened(name, 16), weight="bold"
        )
        for column, picture in enumerate(pictures[name][: len(captions)]):
            left = NAMES_WIDTH + column * cell
            axes = figure.add_axes(
                (
                    left / WIDTH,
                    (bottom + 0.04 * tall) / height,
                    0.95 * cell / WIDTH,
                    0.95 * tall / height,
                )
            )
            axes.imshow(
                picture.movedim(0, -1).numpy(), interpolation="nearest" if wide < 128 else "auto"
            )
            axes.axis("off")
    for column, lines in enumerate(titles):
        place = (NAMES_WIDTH + column * cell) / WIDTH, 1 - (head - 0.07) / height
        label(figure, *place, "\n".join(lines), va="bottom", size=7.5, color=QUIET)
    return png_bytes(figure)
