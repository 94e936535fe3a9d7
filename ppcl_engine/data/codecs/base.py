"""What a codec does: it encodes and decodes words and pictures, and says how a picture is drawn."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch

from ...architectures import Inputs


class Codec(Protocol):
    """Encodes and decodes words and pictures for a transformer, and says how a picture is drawn
    with it.

    Pictures are [n, 3, height, width] in [0, 1]; latents [n, channels, rows, columns]. All fp32 on
    the CPU, in and out; masks are bool.
    """

    rescales_guidance: ClassVar[bool]
    """whether the guided velocity of every token keeps the norm of the caption's"""
    edits: ClassVar[bool]
    """whether captions are instructions, read together with the pictures that they change, the
    references"""

    @property
    def picture_size(self) -> tuple[int, int]:
        """Default height and width of a picture, pixels."""
        ...

    @property
    def latent_channels(self) -> int: ...

    @property
    def pixels_per_latent(self) -> int: ...

    def timesteps(self, steps: int, image_tokens: int) -> list[float]:
        """1, ..., 0, both ends included: the timesteps for a picture of this many tokens"""
        ...

    def text(self, texts: list[str], references: torch.Tensor | None = None) -> Inputs:
        """Everything that the transformer reads of captions, by diffusers' names, one row each.

        references: [n, k, 3, height, width]; ValueError where they are missing, or would not be
        read.
        """
        ...

    def latents(self, pictures: torch.Tensor) -> torch.Tensor: ...

    def pictures(self, latents: torch.Tensor) -> torch.Tensor: ...

    def release(self) -> None: ...


def check_references(edits: bool, given: bool, where: object) -> None:
    """Raises ValueError for an edit model without references, and for references that would not be
    read."""
    if edits and not given:
        raise ValueError(
            f"{where} is an edit model, whose captions change pictures: name them with --references"
        )
    if given and not edits:
        raise ValueError(
            f"{where} draws from text alone here and changes no pictures; leave the references out"
        )
