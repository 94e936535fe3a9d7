"""What judges a picture. One protocol, whatever answers: a vision-language model, a reader of text, or
the reader of the rendered world."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from PIL.Image import Image

ASK, READ, SIMILARITY = "ask", "read", "similarity"


class Grader:
    """Judges one picture at a time. Loads its weights when it is first asked, so that making one is a
    cheap check that everything it needs is there."""

    does: ClassVar[frozenset[str]]
    """what it can do: names of the methods below"""

    @property
    def name(self) -> str:
        """How results name it."""
        raise NotImplementedError

    def ask(self, image: Image, question: str) -> float:
        """The probability that the answer to this question about the picture is yes."""
        raise NotImplementedError

    def read(self, image: Image) -> str:
        """All text in the picture."""
        raise NotImplementedError

    def similarity(self, image: Image, text: str) -> float:
        """How well the picture fits the text, from 0 to 1."""
        raise NotImplementedError
