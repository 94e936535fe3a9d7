"""The registry: an explicit tuple. Unknown input is an error that lists what is known."""

from __future__ import annotations

from collections.abc import Iterable

from .base import REFERENCES, Architecture, BlockState, Inputs, Part, placed
from .flux1 import Flux1
from .projections import SharedText
from .qwen_image import QwenImage
from .qwen_image_21 import QwenImage21
from .sd35 import SD35
from .z_image import ZImage

ARCHITECTURES: tuple[Architecture, ...] = (
    QwenImage(),
    Flux1(),
    SD35(),
    ZImage(),
    QwenImage21(),
)

__all__ = [
    "ARCHITECTURES",
    "REFERENCES",
    "Architecture",
    "BlockState",
    "Inputs",
    "Part",
    "SharedText",
    "architecture_named",
    "detect_architecture",
    "placed",
]


def architecture_named(name: str) -> Architecture:
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    raise ValueError(
        f"unknown architecture {name!r}; known: {', '.join(a.name for a in ARCHITECTURES)}"
    )


def detect_architecture(keys: Iterable[str], where: object) -> Architecture:
    """Raises ValueError naming the known architectures and the first keys of the file."""
    keys = sorted(keys)
    for architecture in ARCHITECTURES:
        if architecture.detect(keys):
            return architecture
    raise ValueError(
        f"{where} is of no known architecture (known: {', '.join(a.name for a in ARCHITECTURES)}); "
        f"its first keys: {', '.join(keys[:4]) or 'none'}"
    )
