"""rapidocr as a grader: it reads text in pictures; its wheel brings the weights."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from ...system.optional_packages import rapidocr
from .base import READ, Grader

if TYPE_CHECKING:
    from PIL.Image import Image


class TextReader(Grader):
    """Raises ValueError where rapidocr, or what runs its networks, is not installed."""

    does = frozenset({READ})

    def __init__(self, needed_for: str):
        self.package = rapidocr(needed_for)
        self._engine = None

    @property
    def name(self) -> str:
        return f"rapidocr {version('rapidocr')}"

    def read(self, image: Image) -> str:
        import numpy as np

        if self._engine is None:
            self._engine = self.package.RapidOCR(params={"Global.log_level": "critical"})
        blue_first = np.asarray(image.convert("RGB"))[:, :, ::-1]
        return " ".join(self._engine(blue_first).txts or ())
