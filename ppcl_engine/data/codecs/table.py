"""`TableCodec`: fixed tables inside the model's own file, which the bundled teachers use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F

from ...architectures import Inputs
from ...system.gguf_files import is_gguf
from ...system.json_text import json_text
from ...system.tensor_files import TensorFile
from ..flow import euler_timesteps
from .base import check_references

TABLES = ("text_encoder.token_embedding", "vae.mean", "vae.encode", "vae.decode")
POSITIONS = "text_encoder.position_embedding"
VOCABULARY_KEY = "vocabulary"


def has_tables(path: Path) -> bool:
    """Whether a model's file has a `TableCodec` in it."""
    return not is_gguf(path) and set(TABLES) <= set(TensorFile(path).entries)


@dataclass(frozen=True)
class TableCodec:
    """A vocabulary's embeddings, and linear maps between 4x4 pixels and a latent.

    The first word of the vocabulary stands for an empty caption.
    """

    vocabulary: tuple[str, ...]
    token_embedding: torch.Tensor
    """[vocabulary, width]"""
    mean: torch.Tensor
    """[48], of a 4x4 block of pixels"""
    encode: torch.Tensor
    """[48, 16]"""
    decode: torch.Tensor
    """[16, 48]"""
    position_embedding: torch.Tensor | None = None
    """[tokens, width]: for a transformer that masks no text and does not number its tokens;
    captions then have this many tokens, and are pooled"""
    picture_size: tuple[int, int] = (48, 48)
    """default height and width, pixels"""
    rescales_guidance: ClassVar[bool] = False
    edits: ClassVar[bool] = False

    @property
    def latent_channels(self) -> int:
        return self.encode.shape[1]

    @property
    def pixels_per_latent(self) -> int:
        return int((len(self.mean) // 3) ** 0.5)

    def tensors(self) -> dict[str, torch.Tensor]:
        values = (self.token_embedding, self.mean, self.encode, self.decode)
        tables: dict[str, torch.Tensor] = dict(zip(TABLES, values, strict=True))
        return (
            tables
            if self.position_embedding is None
            else {**tables, POSITIONS: self.position_embedding}
        )

    def metadata(self) -> dict[str, str]:
        return {VOCABULARY_KEY: json_text(self.vocabulary)}

    def timesteps(self, steps: int, image_tokens: int) -> list[float]:
        """Equal steps, whatever the size."""
        return euler_timesteps(steps)

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] -> [n, 16, H/4, W/4], about unit variance"""
        blocks = F.pixel_unshuffle(pictures, self.pixels_per_latent).movedim(1, -1)
        return ((blocks - self.mean) @ self.encode).movedim(-1, 1)

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """[n, 16, h, w] -> [n, 3, 4h, 4w], clipped to [0, 1]"""
        blocks = latents.movedim(1, -1) @ self.decode + self.mean
        return F.pixel_shuffle(blocks.movedim(-1, 1), self.pixels_per_latent).clamp(0, 1)

    def text(self, texts: list[str], references: torch.Tensor | None = None) -> Inputs:
        """Embeddings [n, tokens, width] with a mask [n, tokens] (True = real), or all of one length
        with their pooled form [n, width]. "" is one empty token."""
        check_references(self.edits, references is not None, "this model")
        rows = [self.tokenize(text) for text in texts]
        length = (
            max(map(len, rows)) if self.position_embedding is None else len(self.position_embedding)
        )
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
        words = self.token_embedding[ids] * mask[..., None]
        if self.position_embedding is None:
            return {"encoder_hidden_states": words, "encoder_hidden_states_mask": mask}
        numbered = words + self.position_embedding * mask[..., None]
        return {
            "encoder_hidden_states": numbered,
            "pooled_projections": words.sum(1) / mask.sum(1, keepdim=True),
        }

    def tokenize(self, text: str) -> list[int]:
        """Word indices. Raises ValueError naming a word that the model never saw, and for too many
        words."""
        words = text.replace(",", " ").split()
        if self.position_embedding is not None and len(words) > len(self.position_embedding):
            raise ValueError(
                f"caption {text!r} has {len(words)} words; this model reads {len(self.position_embedding)}"
            )
        unknown = [word for word in words if word not in self.vocabulary]
        if unknown:
            known = " ".join(self.vocabulary[1:])
            raise ValueError(
                f"caption {text!r}: this model does not know the word {unknown[0]!r}; it knows: {known}"
            )
        return [self.vocabulary.index(word) for word in words] or [0]

    def release(self) -> None:
        """Nothing to release: the tables are kilobytes."""
