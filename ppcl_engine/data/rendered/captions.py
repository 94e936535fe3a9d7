"""The bundled teachers' world: one large character on a coloured shape on a coloured ground, and
its caption.

Pictures are composed from three masks (ground, shape, character), so a batch costs three
multiplications per pixel and training never waits for drawing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin
from pathlib import Path

import torch

SIZE = 48  # pixels, both sides
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789"
SHAPES = ("circle", "square", "diamond", "hexagon")
COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.10, 0.60, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.55, 0.15, 0.65),
    "orange": (0.98, 0.55, 0.08),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
}
COLOUR_NAMES = tuple(COLOURS)
RADII = (20, 21, 22)
GLYPH_PIXELS = 34
SUPERSAMPLING = 4
JITTER = 1  # pixels by which the shape, and the character on it, may be off centre


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What a picture shows; each field is an index into the table of its name."""

    character: int
    character_colour: int
    shape: int
    shape_colour: int
    background: int

    def text(self) -> str:
        colour = COLOUR_NAMES
        return (
            f"a {colour[self.character_colour]} {CHARACTERS[self.character]} on a "
            f"{colour[self.shape_colour]} {SHAPES[self.shape]}, {colour[self.background]} background"
        )


FIELDS = ("character", "character_colour", "shape", "shape_colour", "background")


def parse_caption(text: str) -> Caption:
    """The inverse of `Caption.text`. Raises ValueError with the expected form."""
    words = text.replace(",", " ").split()
    try:
        article, char_colour, character, on, article2, shape_colour, shape, ground, noun = words
        if (article, on, article2, noun) != ("a", "on", "a", "background") or len(character) != 1:
            raise ValueError
        return Caption(
            character=CHARACTERS.index(character),
            character_colour=COLOUR_NAMES.index(char_colour),
            shape=SHAPES.index(shape),
            shape_colour=COLOUR_NAMES.index(shape_colour),
            background=COLOUR_NAMES.index(ground),
        )
    except ValueError:
        raise ValueError(
            f"caption {text!r} is not of the form 'a red K on a blue circle, yellow background'; "
            f"characters {CHARACTERS}, colours {', '.join(COLOUR_NAMES)}, shapes {', '.join(SHAPES)}"
        ) from None


def random_captions(count: int, generator: torch.Generator) -> list[Caption]:
    """`count` captions, uniform over all whose three colours differ."""
    characters = torch.randint(len(CHARACTERS), (count,), generator=generator).tolist()
    shapes = torch.randint(len(SHAPES), (count,), generator=generator).tolist()
    colours = torch.rand(count, len(COLOURS), generator=generator).argsort(dim=1)[:, :3].tolist()
    return [
        Caption(character=c, character_colour=k[0], shape=s, shape_colour=k[1], background=k[2])
        for c, s, k in zip(characters, shapes, colours, strict=True)
    ]


def caption_table(captions: list[Caption]) -> torch.Tensor:
    """The captions as int64 [count, 5], columns in the order of FIELDS."""
    return torch.tensor([[getattr(c, field) for field in FIELDS] for c in captions])


def render(captions: list[Caption], generator: torch.Generator) -> torch.Tensor:
    """Pictures [count, 3, 48, 48] in [0, 1]; the generator places shape and character."""
    table = caption_table(captions)
    count = len(captions)
    palette = torch.tensor(list(COLOURS.values()))
    radius = torch.randint(len(RADII), (count,), generator=generator)
    side = 2 * JITTER + 1
    place = torch.randint(side * side, (2, count), generator=generator)
    shape = _shape_masks()[table[:, 2], radius, place[0]][:, None]
    glyph = _glyph_masks()[table[:, 0], place[1]][:, None]
    ground, body, letter = (palette[table[:, column]][:, :, None, None] for column in (4, 3, 1))
    return torch.lerp(torch.lerp(ground.expand(-1, -1, SIZE, SIZE), body, shape), letter, glyph)


@lru_cache(maxsize=1)
def _shape_masks() -> torch.Tensor:
    """[shape, radius, place, 48, 48], anti-aliased."""
    rows = [torch.stack([_jittered(_shape_mask(name, r)) for r in RADII]) for name in SHAPES]
    return torch.stack(rows)


@lru_cache(maxsize=1)
def _glyph_masks() -> torch.Tensor:
    """[character, place, 48, 48], anti-aliased."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    path = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    font = ImageFont.truetype(str(path), GLYPH_PIXELS * SUPERSAMPLING)
    centre = SIZE * SUPERSAMPLING / 2

    def draw_character(character):
        return lambda draw: draw.text((centre, centre), character, fill=255, font=font, anchor="mm")

    return torch.stack([_jittered(_drawn(draw_character(c))) for c in CHARACTERS])


def _shape_mask(name: str, radius: int) -> torch.Tensor:
    centre, r = SIZE * SUPERSAMPLING / 2, radius * SUPERSAMPLING
    if name == "circle":
        return _drawn(
            lambda d: d.ellipse([centre - r, centre - r, centre + r, centre + r], fill=255)
        )
    corners, turn, stretch = {
        "square": (4, pi / 4, 1.25),
        "diamond": (4, 0, 1.1),
        "hexagon": (6, 0, 1.05),
    }[name]
    angles = [turn + 2 * pi * i / corners for i in range(corners)]
    points = [(centre + r * stretch * cos(a), centre + r * stretch * sin(a)) for a in angles]
    return _drawn(lambda d: d.polygon(points, fill=255))


def _drawn(draw_on) -> torch.Tensor:
    import numpy as np
    from PIL import Image, ImageDraw

    image = Image.new("L", (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING), 0)
    draw_on(ImageDraw.Draw(image))
    small = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)


def _jittered(mask: torch.Tensor) -> torch.Tensor:
    shifts = range(-JITTER, JITTER + 1)
    return torch.stack([mask.roll((dy, dx), (0, 1)) for dy in shifts for dx in shifts])
