"""Prompts for a calibration, as a file in its run: the words, or what the host's text encoder makes
of them; or, for an edit model, pictures with an instruction each."""

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
    """Its file's name holds a hash of what is in it, so that a run of other prompts is another
    run."""

    text: str

    setting = "prompts"

    def __post_init__(self):
        check_length("prompts", self.text)
        if not 0 < len(self.lines) <= MOST:
            raise ValueError(
                f"{len(self.lines)} prompts are given; write 1 to {MOST:,}, one a line"
            )

    @property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.splitlines() if line.strip()]

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
        """By the host's text encoder."""
        return EncodedPrompts(
            tuple(map(lambda text: _encode(clip, text), self.lines)), _encode(clip, "")
        )


@dataclass(frozen=True)
class Encoded:
    """text [tokens, width]; pooled [width] where the encoder gives it."""

    text: torch.Tensor
    pooled: torch.Tensor | None = None


@dataclass(frozen=True)
class EncodedPrompts:
    """given: each prompt; nothing: the empty one."""

    given: tuple[Encoded, ...]
    nothing: Encoded

    setting = "embeddings"

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """As `CalibrateConfig.embeddings` says; padded to one length, the empty one's if that is
        the longest."""
        rows = [*self.given, self.nothing]
        masks = [torch.ones(len(row.text), dtype=torch.bool) for row in rows]
        text, mask = (_padded(part) for part in ([row.text for row in rows], masks))
        tensors = {
            "text": text[:-1].clone(),
            "mask": mask[:-1].clone(),
            "empty": self.nothing.text[None],
        }
        if self.nothing.pooled is None:
            return tensors
        pooled = torch.stack([row.pooled for row in self.given])
        return {**tensors, "pooled": pooled, "empty_pooled": self.nothing.pooled[None].clone()}

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
    """A folder of pictures, each with its .txt, copied into the run: its name holds a hash of what
    is in it."""

    folder: Path

    setting = "references"

    def __post_init__(self):
        if len(self.files) > 2 * MOST:
            raise ValueError(
                f"{self.folder.name} holds {len(self.files) // 2:,} pictures; give at most {MOST:,}"
            )

    @cached_property
    def files(self) -> list[Path]:
        """Raises ValueError for a folder without pictures, and naming one without an
        instruction."""
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
    """Without the padding that some encoders give. Raises ValueError for an encoder of more than
    text tokens."""
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
