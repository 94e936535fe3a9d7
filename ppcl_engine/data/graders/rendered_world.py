"""The reader of the rendered world as a grader: it judges what the bundled teachers draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..rendered.captions import CHARACTERS, COLOUR_NAMES, FIELDS, SHAPES, SIZE
from ..rendered.reader import CaptionReader, load_reader
from .base import ASK, READ, SIMILARITY, Grader

if TYPE_CHECKING:
    from PIL.Image import Image

TABLES: dict[str, Sequence[str]] = dict(
    zip(FIELDS, (CHARACTERS, COLOUR_NAMES, SHAPES, COLOUR_NAMES, COLOUR_NAMES), strict=True)
)
COLOUR_OF = {"character": "character_colour", "shape": "shape_colour", "background": "background"}
"""what has a colour -> the field that says which"""
FILLING = set(
    [
        "is",
        "there",
        "are",
        "a",
        "an",
        "the",
        "on",
        "in",
        "this",
        "picture",
        "does",
        "show",
        "with",
        "and",
    ]
)


class RenderedWorldReader(Grader):
    """Answers questions that name characters, shapes and colours, such as "Is there a red K on a blue
    circle in this picture?"."""

    does = frozenset({ASK, READ, SIMILARITY})

    def __init__(self) -> None:
        self._reader: CaptionReader | None = None

    @property
    def name(self) -> str:
        return "the reader of the rendered world"

    def ask(self, image: Image, question: str) -> float:
        seen, probability = self._seen(image), 1.0
        for field, value in named_in(question):
            probability *= float(seen[field][TABLES[field].index(value)])
        return probability

    def read(self, image: Image) -> str:
        return CHARACTERS[int(self._seen(image)["character"].argmax())]

    def similarity(self, image: Image, text: str) -> float:
        return self.ask(image, text)

    def _seen(self, image: Image) -> dict[str, torch.Tensor]:
        """Field -> probabilities of its classes."""
        import numpy as np

        if self._reader is None:
            self._reader = load_reader()
        pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32) / 255
        with torch.no_grad():
            logits = self._reader(torch.from_numpy(pixels).movedim(-1, 0)[None])
        return {field: values[0].softmax(0) for field, values in logits.items()}


def named_in(question: str) -> list[tuple[str, str]]:
    """(field, value) of everything that a question names. A colour is that of the thing behind it, or
    else of the one before it. Raises ValueError for a question about anything else."""
    words = [word for word in question.replace(",", " ").replace("?", " ").split()]
    words = [word for word in words if word in CHARACTERS or word.lower() not in FILLING]
    things = [_thing(word) for word in words]
    named = []
    for place, (word, thing) in enumerate(zip(words, things, strict=True)):
        if thing in ("character", "shape"):
            named.append((thing, word))
        elif word in COLOUR_NAMES:
            behind = things[place + 1 : place + 2] or [None]
            owner = behind[0] or next((t for t in reversed(things[:place]) if t), None)
            if owner is None:
                raise _cannot(question)
            named.append((COLOUR_OF[owner], word))
        elif thing is None:
            raise _cannot(question)
    if not named:
        raise _cannot(question)
    return named


def _thing(word: str) -> str | None:
    if word == "background":
        return word
    if len(word) == 1 and word in CHARACTERS:
        return "character"
    return "shape" if word in SHAPES else None


def _cannot(question: str) -> ValueError:
    return ValueError(
        f"the reader of the rendered world cannot judge {question!r}: it knows characters, shapes and "
        "their colours; name the folder of a vision-language model with --judge"
    )
