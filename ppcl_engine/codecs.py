"""Words and pictures to the tensors a transformer reads, and back.

`TableCodec`: fixed tables inside the model's own file. `PipelineCodec` (pipeline_folder.py): the text
encoder and VAE of a diffusers folder. `open_codec` picks by what lies beside the transformer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F

from .architectures import Inputs
from .files import TensorFile, check_exists
from .flow import euler_timesteps

TABLES = ("text_encoder.token_embedding", "vae.mean", "vae.encode", "vae.decode")
POSITIONS = "text_encoder.position_embedding"
VOCABULARY_KEY = "vocabulary"


class Codec(Protocol):
    """What surrounds a transformer, and how a picture is drawn with it.

    Pictures are [n, 3, height, width] in [0, 1]; latents [n, channels, rows, columns]. All fp32 on the CPU, in
    and out; masks are bool.
    """

    picture_size: tuple[int, int]
    """default height and width of a picture, pixels"""
    latent_channels: int
    pixels_per_latent: int
    rescales_guidance: bool
    """whether the guided velocity of every token keeps the norm of the caption's"""
    edits: bool
    """whether captions are instructions, read with the pictures that they change, the references"""

    def timesteps(self, steps: int, image_tokens: int) -> list[float]:
        """1, ..., 0, both ends included: where a picture of so many tokens is sampled"""
        ...

    def text(self, texts: list[str], references: torch.Tensor | None = None) -> Inputs:
        """All that the transformer reads of captions, by diffusers' names; a row each. references: [n, k, 3, height,
        width]; ValueError where they are missing, or not read."""
        ...

    def latents(self, pictures: torch.Tensor) -> torch.Tensor: ...

    def pictures(self, latents: torch.Tensor) -> torch.Tensor: ...

    def release(self) -> None: ...


@dataclass(frozen=True)
class TableCodec:
    """token_embedding [vocabulary, width]; mean [48], encode [48, 16], decode [16, 48] of a 4x4 block.

    The first word of the vocabulary stands for an empty caption. position_embedding [tokens, width]: for a
    transformer that masks no text and does not number its tokens; captions then are that long, and pooled.
    """

    vocabulary: tuple[str, ...]
    token_embedding: torch.Tensor
    mean: torch.Tensor
    encode: torch.Tensor
    decode: torch.Tensor
    position_embedding: torch.Tensor | None = None
    picture_size: tuple[int, int] = (48, 48)
    rescales_guidance: ClassVar[bool] = False
    edits: ClassVar[bool] = False

    @property
    def latent_channels(self) -> int:
        return self.encode.shape[1]

    @property
    def pixels_per_latent(self) -> int:
        return int((len(self.mean) // 3) ** 0.5)

    def tensors(self) -> dict[str, torch.Tensor]:
        tables = dict(zip(TABLES, (self.token_embedding, self.mean, self.encode, self.decode), strict=True))
        return tables if self.position_embedding is None else {**tables, POSITIONS: self.position_embedding}

    def metadata(self) -> dict[str, str]:
        return {VOCABULARY_KEY: json.dumps(self.vocabulary)}

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
        """Embeddings [n, tokens, width] with a mask [n, tokens] (True = real), or all of one length with their
        pooled form [n, width]. "" is one empty token."""
        check_references(self.edits, references is not None, "this model")
        rows = [self.tokenize(text) for text in texts]
        length = max(map(len, rows)) if self.position_embedding is None else len(self.position_embedding)
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
        words = self.token_embedding[ids] * mask[..., None]
        if self.position_embedding is None:
            return {"encoder_hidden_states": words, "encoder_hidden_states_mask": mask}
        numbered = words + self.position_embedding * mask[..., None]
        return {"encoder_hidden_states": numbered, "pooled_projections": words.sum(1) / mask.sum(1, keepdim=True)}

    def tokenize(self, text: str) -> list[int]:
        """Word indices. Raises ValueError naming the word that the model never saw, and for too many words."""
        words = text.replace(",", " ").split()
        if self.position_embedding is not None and len(words) > len(self.position_embedding):
            raise ValueError(
                f"caption {text!r} has {len(words)} words; this model reads {len(self.position_embedding)}"
            )
        unknown = [word for word in words if word not in self.vocabulary]
        if unknown:
            known = " ".join(self.vocabulary[1:])
            raise ValueError(f"caption {text!r}: this model does not know the word {unknown[0]!r}; it knows: {known}")
        return [self.vocabulary.index(word) for word in words] or [0]

    def release(self) -> None:
        """Nothing to release: the tables are kilobytes."""


def check_references(edits: bool, given: bool, where: object) -> None:
    """Raises ValueError for an edit model without references, and for references that nothing would read."""
    if edits and not given:
        raise ValueError(f"{where} is an edit model, whose captions change pictures: name them with --references")
    if given and not edits:
        raise ValueError(f"{where} draws from text alone and changes no pictures; leave the references out")


def open_codec(path: Path, device: str = "cpu") -> Codec:
    """The codec of a model. Raises ValueError for a model that has none (a transformer's file alone)."""
    path = Path(path)
    check_exists(path)
    if path.is_dir() and (path / "model_index.json").exists():
        from .pipelines import open_pipeline

        return open_pipeline(path, device)
    if path.is_file():
        file = TensorFile(path)
        if set(TABLES) <= set(file.entries) and VOCABULARY_KEY in file.metadata:
            names = (*TABLES, POSITIONS) if POSITIONS in file.entries else TABLES
            tables = (file.read(name).float() for name in names)
            return TableCodec(tuple(json.loads(file.metadata[VOCABULARY_KEY])), *tables)
    raise ValueError(
        f"{path} brings no text encoder and VAE; give a diffusers pipeline folder, "
        "or stored embeddings with --embeddings"
    )
