"""Tensors that are read when they are written: by ComfyUI's names, several joined in one, and as a
file in safetensors or GGUF."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from ..architectures import Architecture, Part
from ..system.gguf_files import write_gguf
from ..system.progress import Progress
from ..system.tensor_files import TensorEntry, write_tensor_stream
from .stored_layout import StoredTensors
from .storing import gguf_entry, stored_entries

EVERYWHERE: Mapping[str, str] = MappingProxyType({})
"""every tensor is stored alike"""


@dataclass(frozen=True)
class Source:
    """A tensor to be read when it is written."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    of: tuple[str, ...] = ()
    """diffusers' names, with the teacher's indices, of the tensors that it is made of; empty: not known"""
    unchanged: bool = False
    """whether it is what the file that it comes from has under the same name"""


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

    names = tuple(dict.fromkeys(name for s, _, _ in pieces for name in s.of))
    unchanged = all(piece.unchanged for piece, _, _ in pieces)
    return Source((source.shape[0] // of * len(pieces), *source.shape[1:]), read, names, unchanged)


def write_sources(
    path: Path,
    sources: dict[str, Source],
    store: str,
    metadata: dict[str, str],
    extra: dict[str, torch.Tensor] | None = None,
    original: StoredTensors | None = None,
    stores: Mapping[str, str] = EVERYWHERE,
) -> None:
    """A safetensors file of `sources`, read one at a time and stored as `store` says, or `stores` for a
    tensor of this name, and of `extra`, unchanged. original: where unchanged sources come from."""
    entries = []
    with Progress(total=len(sources), desc=path.stem, unit="tensor") as bar:
        for key, source in sources.items():
            read, chosen = partial(_counted, bar, source), stores.get(key, store)
            own = stored_entries(key, source.shape, read, chosen)
            entries += as_stored(original, own) if original and source.unchanged else own
        entries += [
            TensorEntry(key, t.dtype, tuple(t.shape), lambda t=t: t)
            for key, t in (extra or {}).items()
        ]
        write_tensor_stream(path, entries, metadata)


def as_stored(original: StoredTensors, entries: list[TensorEntry]) -> list[TensorEntry]:
    """A tensor, or a quantised matrix with its scales, as a file has it, where the file has the same
    form: so nothing is rounded a second time."""
    copies = []
    for entry in entries:
        if entry.name not in original:
            return entries
        file, name = original[entry.name]
        if (file.dtype(name), tuple(file.shape(name))) != (entry.dtype, entry.shape):
            return entries
        # bytes are the text that names the form
        if entry.dtype is torch.uint8 and not torch.equal(file.read(name), entry.read()):
            return entries
        copies.append(replace(entry, read=partial(file.read, name)))
    return copies


def write_gguf_sources(
    path: Path,
    architecture: Architecture,
    sources: dict[str, Source],
    store: str,
    metadata: dict[str, str],
    extra: dict[str, torch.Tensor],
    stores: Mapping[str, str] = EVERYWHERE,
) -> None:
    """The same in GGUF, which has no bytes: texts are stored as half-precision numbers."""
    with Progress(total=len(sources), desc=path.stem, unit="tensor") as bar:
        entries = [
            gguf_entry(key, source.shape, partial(_counted, bar, source), stores.get(key, store))
            for key, source in sources.items()
        ]
        entries += [
            (
                "F16" if t.dtype is torch.uint8 else "F32",
                TensorEntry(key, t.dtype, tuple(t.shape), lambda t=t: t),
            )
            for key, t in extra.items()
        ]
        write_gguf(path, architecture.gguf_name, entries, metadata)


def _counted(bar: Progress, source: Source) -> torch.Tensor:
    bar.update()
    return source.read()
