"""Pictures of several variants side by side: a column for each, with its size and speed below."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from ...system.numbers import bytes_text, count_text, seconds_text
from .canvas import INK, QUIET, RULE

NARROWEST = 300  # pixels of a column: its text needs so many
WIDEST = 1024  # pixels of a column; larger pictures are scaled down
GAP = 4  # pixels between the pictures of a column


@dataclass(frozen=True, kw_only=True)
class Column:
    """A variant's pictures, and what it took to draw them."""

    name: str
    pictures: torch.Tensor
    """float [n, height, width, 3] in [0, 1]"""
    parameters: int
    """of the model that drew them"""
    bytes: int
    """of its weights"""
    seconds: float | None = None
    """of a step; None: not known"""

    def lines(self, first: Column) -> list[str]:
        """The text below the column; shares are relative to the first column."""
        share = f" ({100 * self.parameters / first.parameters:.0f} %)" if self is not first else ""
        size = f"{bytes_text(self.bytes)}, {count_text(self.parameters)} parameters{share}"
        if self.seconds is None:
            return [size, "seconds a step: not known"]
        faster = (
            f" ({first.seconds / self.seconds:.2f} x as fast)"
            if self is not first and first.seconds
            else ""
        )
        return [size, f"{seconds_text(self.seconds)} a step{faster}"]


def side_by_side(columns: list[Column]) -> torch.Tensor:
    """float [1, height, width, 3]. Several pictures of a column are tiled; small ones are enlarged
    without smoothing."""
    tiles = [_tiled(column.pictures) for column in columns]
    wide = (
        min(max(*(t.width for t in tiles), NARROWEST), WIDEST)
        if len(tiles) > 1
        else max(tiles[0].width, NARROWEST)
    )
    tiles = [_scaled(tile, wide) for tile in tiles]
    unit = max(16, wide // 17)
    margin, tall = unit, max(tile.height for tile in tiles)
    height = margin + tall + round(5.2 * unit)
    sheet = Image.new("RGB", (margin + len(tiles) * (wide + margin), height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (column, tile) in enumerate(zip(columns, tiles, strict=True)):
        left = margin + number * (wide + margin)
        sheet.paste(tile, (left, margin))
        _write(draw, column.name, column.lines(columns[0]), left, margin + tall, wide, unit)
    return (
        torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
        .view(1, height, -1, 3)
        .float()
        / 255
    )


def _write(draw, name: str, lines: list[str], left: int, top: int, wide: int, unit: int) -> None:
    title, text = (
        ImageFont.load_default(round(1.15 * unit)),
        ImageFont.load_default(round(0.82 * unit)),
    )
    draw.line(
        [left, top + 0.45 * unit, left + wide, top + 0.45 * unit],
        fill=RULE,
        width=max(1, unit // 14),
    )
    draw.text(
        (left, top + 1.35 * unit),
        _fitting(draw, name, title, wide),
        fill=INK,
        font=title,
        anchor="lm",
    )
    for row, line in enumerate(lines):
        place = (left, top + (2.7 + 1.15 * row) * unit)
        draw.text(place, _fitting(draw, line, text, wide), fill=QUIET, font=text, anchor="lm")


def _fitting(draw, text: str, font, wide: int) -> str:
    if draw.textlength(text, font=font) <= wide:
        return text
    while text and draw.textlength(text + "...", font=font) > wide:
        text = text[:-1]
    return text + "..."


def _tiled(pictures: torch.Tensor) -> Image.Image:
    """The pictures in reading order, in a grid that is as square as possible."""
    count, height, width, _ = pictures.shape
    across = math.ceil(math.sqrt(count))
    rows = math.ceil(count / across)
    sheet = Image.new("RGB", (across * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for index, picture in enumerate((pictures[..., :3].clamp(0, 1) * 255).round().byte().cpu()):
        row, column = divmod(index, across)
        sheet.paste(
            Image.fromarray(picture.numpy()), (column * (width + GAP), row * (height + GAP))
        )
    return sheet


def _scaled(tile: Image.Image, wide: int) -> Image.Image:
    if tile.width == wide:
        return tile
    size = (wide, max(1, round(tile.height * wide / tile.width)))
    return tile.resize(
        size, Image.Resampling.NEAREST if tile.width < wide else Image.Resampling.LANCZOS
    )
