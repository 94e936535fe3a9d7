"""Tensors that are read when they are written: by ComfyUI's names, several joined in one, and as a
file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..architectures import Architecture, Part
from ..system.float8 import scaled_entries
from ..system.progress import Progress
from ..system.tensor_files import TensorEntry, write_tensor_stream


@dataclass(frozen=True)
class Source:
    """A tensor to be read when it is written."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def comfyui_sources(architecture: Architecture, sources: dict[str, Source]) -> dict[str, Source]:
    """The same tensors by ComfyUI's names; some of these hold several of diffusers'."""
    return joined_sources(sources, {key: architecture.to_comfyui(key, sources) for key in sources})


def joined_sources(sources: dict[str, Source], parts: dict[str, Part]) -> dict[str, Source]:
    """Tensors by their names in `parts`, joined where several lie in one; of a cut map, the pieces
    that are left."""
    tensors: dict[str, dict[int, tuple[Source, int, int]]] = {}
    for key, source in sources.items():
        part = parts[key]
        pieces = tensors.setdefault(part.name, {})
        for position, piece in enumerate(part.pieces):
            pieces[piece] = (source, position, len(part.pieces))
    return {name: _joined([pieces[n] for n in sorted(pieces)]) for name, pieces in tensors.items()}


def _joined(pieces: list[tuple[Source, int, int]]) -> Source:
    """One tensor from equal pieces: (tensor, which of its pieces, of how many)."""
    source, position, of = pieces[0]
    if len(pieces) == 1:
        return source

    def read() -> torch.Tensor:
        cut = {s: s.read().chunk(n) for s, n in dict.fromkeys((s, n) for s, _, n in pieces)}
        return torch.cat([cut[s][position] for s, position, _ in pieces])

    return Source((source.shape[0] // of * len(pieces), *source.shape[1:]), read)


def write_sources(
    path: Path,
    sources: dict[str, Source],
    dtype: torch.dtype,
    metadata: dict[str, str],
    extra: dict[str, torch.Tensor] | None = None,
    scaled: bool = False,
) -> None:
    """A safetensors file of `sources` in `dtype`, read one at a time, and of `extra`, unchanged.

    scaled: matrices in fp8 with one scale each, as ComfyUI reads them.
    """
    bar = Progress(total=len(sources), desc=path.stem, unit="tensor")

    def counted(source: Source) -> torch.Tensor:
        bar.update()
        return source.read()

    entries = []
    for key, source in sources.items():
        read = partial(counted, source)
        entries += (
            scaled_entries(key, source.shape, read)
            if scaled and _is_matrix(key, source)
            else [TensorEntry(key, dtype, source.shape, read)]
        )
    entries += [
        TensorEntry(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in (extra or {}).items()
    ]
    with bar:
        write_tensor_stream(path, entries, metadata)


def _is_matrix(key: str, source: Source) -> bool:
    """Whether it is a linear map's weight: all other tensors of two dimensions are embedding
    tables."""
    return len(source.shape) == 2 and key.endswith(".weight") and "embedding.weight" not in key
