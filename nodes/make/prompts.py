"""Prompts for a calibration, as a file in its run: as words, as embeddings by the host's text encoder,
or, for an edit model, as pictures with an instruction each."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...ppcl_engine.data.picture_files import picture_files
from ...ppcl_engine.system.atomic import replacing, write_text
from ...ppcl_engine.system.tensor_files import write_tensors
from ..widgets import check_length

MOST = 10_000


@dataclass(frozen=True)
class Prompts:
    """Prompts as words. The name of the file has a hash of its content, so that other prompts make
    another run."""

    text: str
    """one prompt a line"""

    setting = "prompts"

    def __post_init__(self):
        check_length("prompts", self.text)
        if not 0 < len(self.lines) <= MOST:
            raise ValueError(
                f"{len(self.lines)} prompts are given; write 1 to {MOST:,}, one a line"
            )

    @property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    @property
    def content(self) -> str:
        return "\n".join(self.lines) + "\n"

    @property
    def file(self) -> str:
        return f"prompts-{hashlib.sha256(self.content.encode()).hexdigest()[:8]}.txt"

    def write(self, folder: Path) -> None:
        if not (folder / self.file).exists():
            write_text(folder / self.file, self.content)

    def encoded(self, clip) -> EncodedPrompts:
        """The same prompts, encoded by the host's text encoder."""
        positive = tuple(_encode(clip, line) for line in self.lines)
        return EncodedPrompts(positive, _encode(clip, ""))


@dataclass(frozen=True)
class Encoded:
    """One prompt as the host's text encoder gives it."""

    text: torch.Tensor
    """[tokens, width]"""
    pooled: torch.Tensor | None = None
    """[width], if the encoder gives it"""


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as embeddings."""

    positive: tuple[Encoded, ...]
    """each prompt"""
    negative: Encoded
    """the empty prompt"""

    setting = "embeddings"

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the file, as `CalibrateConfig.embeddings` describes it. Prompts are padded to
        the longest of all, the empty one included."""
        rows = [*self.positive, self.negative]
        masks = [torch.ones(len(row.text), dtype=torch.bool) for row in rows]
        text, mask = (_padded(part) for part in ([row.text for row in rows], masks))
        tensors = {
            "text": text[:-1].clone(),
            "mask": mask[:-1].clone(),
            "empty": self.negative.text[None],
        }
        if self.negative.pooled is None:
            return tensors
        pooled = torch.stack([row.pooled for row in self.positive])
        return {**tensors, "pooled": pooled, "empty_pooled": self.negative.pooled[None].clone()}

    @property
    def file(self) -> str:
        digest = hashlib.sha256()
        for tensor in self.tensors.values():
            digest.update(
                str(tuple(tensor.shape)).encode()
                + tensor.contiguous().view(torch.uint8).numpy().tobytes()
            )
        return f"embeddings-{digest.hexdigest()[:8]}.safetensors"

    def write(self, folder: Path) -> None:
        if not (folder / self.file).exists():
            write_tensors(folder / self.file, self.tensors)


@dataclass(frozen=True)
class References:
    """Pictures to edit, copied into the run. The name of the copy has a hash of its content, so that
    other pictures make another run."""

    folder: Path
    """with pictures, and a .txt of the same name for each"""

    setting = "references"

    def __post_init__(self):
        if len(self.files) > 2 * MOST:
            raise ValueError(
                f"{self.folder.name} holds {len(self.files) // 2:,} pictures; give at most {MOST:,}"
            )

    @cached_property
    def files(self) -> list[Path]:
        """Pictures and their instructions. Raises ValueError for a folder without pictures and for a
        picture without an instruction."""
        return [
            file
            for picture, _ in picture_files(self.folder)
            for file in (picture, picture.with_suffix(".txt"))
        ]

    @cached_property
    def file(self) -> str:
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
        return f"references-{digest.hexdigest()[:8]}"

    def write(self, folder: Path) -> None:
        for path in self.files:
            target = folder / self.file / path.name
            if not target.exists():
                with replacing(target) as temporary:
                    shutil.copyfile(path, temporary)


def _padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _encode(clip, text: str) -> Encoded:
    """A prompt, without the padding that some encoders add. Raises ValueError for an encoder that
    gives anything but text tokens."""
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    embedding, more = conditioning[0]
    if len(conditioning) != 1 or embedding.ndim != 3:
        raise ValueError(
            "this CLIP does not give a plain text embedding; connect the text encoder of model_file"
        )
    mask = more.get("attention_mask")
    mask = (
        torch.ones(embedding.shape[1], dtype=torch.bool) if mask is None else mask[0].bool().cpu()
    )
    pooled = more.get("pooled_output")
    return Encoded(
        embedding[0].float().cpu()[mask], None if pooled is None else pooled[0].float().cpu()
    )
