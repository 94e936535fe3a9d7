"""Pictures as the host's IMAGE: from the bytes of a PNG, stacked, or a card with text."""

from __future__ import annotations

import io as bytes_io

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..ppcl_engine.report.drawings.canvas import INK

# of a card: its width and the height of a line in pixels; number of lines
CARD, LINE, MOST_LINES = 900, 26, 4


def tensor_of(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def stacked(pictures: list[torch.Tensor]) -> torch.Tensor:
    """Pictures of one width, one below the other."""
    return torch.cat(pictures, dim=1)


def text_card(text: str, colour: str) -> torch.Tensor:
    font, draw = ImageFont.load_default(20), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = _wrapped(draw, text, font, CARD - 50)[:MOST_LINES]
    picture = Image.new("RGB", (CARD, LINE * len(lines) + 24), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 8, picture.height), fill=colour)
    for row, line in enumerate(lines):
        draw.text((28, 12 + LINE * row), line, fill=INK, font=font)
    return tensor_of(picture)


def table_card(title: str, rows: list[tuple[str, ...]], colour: str) -> torch.Tensor:
    """A table below a line of text: the first column to the left, the others to the right."""
    font, draw = ImageFont.load_default(20), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    above = _wrapped(draw, title, font, CARD - 50)[:MOST_LINES]
    picture = Image.new("RGB", (CARD, LINE * (len(above) + len(rows)) + 34), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 8, picture.height), fill=colour)
    for row, line in enumerate(above):
        draw.text((28, 12 + LINE * row), line, fill=INK, font=font)
    top = 22 + LINE * len(above)
    width = (CARD - 50) // max(len(row) for row in rows)
    for number, row in enumerate(rows):
        for column, text in enumerate(row):
            place = (28 + width * (column + bool(column)), top + LINE * number)
            draw.text(place, text, fill=INK, font=font, anchor="ra" if column else "la")
    return tensor_of(picture)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font, wide: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) > wide and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def picture_of(png: bytes) -> torch.Tensor:
    pixels = np.asarray(Image.open(bytes_io.BytesIO(png)).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255)[None]
