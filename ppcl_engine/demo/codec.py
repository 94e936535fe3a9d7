"""Captions to text embeddings and pictures to latents, by fixed tables instead of big encoders.

A picture is cut into 4x4 blocks; each block's 48 values go through a principal component
analysis to 16 channels. Tokens are words; every word has one fixed random embedding.
Both tables live in the teacher's own file under `text_encoder.` and `vae.`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .task import CHARACTERS, COLOUR_NAMES, SHAPES, random_captions, render

CHANNELS = 16
BLOCK = 4  # pixels a latent position covers
TEXT_WIDTH = 64
EMPTY = "<empty>"
VOCABULARY = (EMPTY, "a", "on", "background", *COLOUR_NAMES, *SHAPES, *CHARACTERS)


@dataclass(frozen=True)
class Codec:
    """Tensors: token_embedding [vocabulary, 64], mean [48], encode [48, 16], decode [16, 48]."""

    token_embedding: torch.Tensor
    mean: torch.Tensor
    encode: torch.Tensor
    decode: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "text_encoder.token_embedding": self.token_embedding,
            "vae.mean": self.mean,
            "vae.encode": self.encode,
            "vae.decode": self.decode,
        }

    @staticmethod
    def from_tensors(tensors: dict[str, torch.Tensor]) -> Codec:
        names = ("text_encoder.token_embedding", "vae.mean", "vae.encode", "vae.decode")
        return Codec(*(tensors[name].float() for name in names))

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, 16, H/4, W/4], about unit variance."""
        blocks = F.pixel_unshuffle(pictures, BLOCK).movedim(1, -1)
        return ((blocks - self.mean) @ self.encode).movedim(-1, 1)

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """[n, 16, h, w] -> [n, 3, 4h, 4w], clipped to [0, 1]."""
        blocks = latents.float().movedim(1, -1) @ self.decode + self.mean
        return F.pixel_shuffle(blocks.movedim(-1, 1), BLOCK).clamp(0, 1)

    def text(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [n, tokens, 64] and mask [n, tokens] (True = real). "" is one empty token."""
        rows = [tokenize(text) for text in texts]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
        return self.token_embedding[ids] * mask[..., None], mask


def tokenize(text: str) -> list[int]:
    """Word indices. Raises ValueError naming the word that the demo's teacher never saw."""
    words = text.replace(",", " ").split() or [EMPTY]
    unknown = [word for word in words if word not in VOCABULARY]
    if unknown:
        raise ValueError(
            f"caption {text!r}: the demo's teacher does not know the word {unknown[0]!r}; "
            f"it knows: {' '.join(VOCABULARY[1:])}"
        )
    return [VOCABULARY.index(word) for word in words]


def fit_codec(seed: int, samples: int = 4096) -> Codec:
    """Principal components of rendered 4x4 blocks, each scaled by the square root of its deviation.

    Full whitening would give the faintest component the weight of the strongest, none would
    leave noise levels per channel far apart; the square root is the middle.
    """
    generator = torch.Generator().manual_seed(seed)
    pictures = render(random_captions(samples, generator), generator)
    blocks = F.pixel_unshuffle(pictures, BLOCK).movedim(1, -1).flatten(0, 2).double()
    mean = blocks.mean(0)
    _, values, vectors = torch.linalg.svd(
        (blocks - mean).T @ (blocks - mean) / len(blocks), full_matrices=False
    )
    deviation = values[:CHANNELS].sqrt()
    scale = deviation.sqrt() * deviation.mean().sqrt()  # mean channel variance becomes one
    basis = vectors[:CHANNELS].T
    embedding = torch.randn(len(VOCABULARY), TEXT_WIDTH, generator=generator)
    return Codec(
        token_embedding=embedding,
        mean=mean.float(),
        encode=(basis / scale).float().contiguous(),
        decode=(basis * scale).T.float().contiguous(),
    )
