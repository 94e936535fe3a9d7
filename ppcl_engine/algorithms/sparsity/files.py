"""Sparse models as files: metadata records what was done, 2:4 matrices are compressed, and the rest
is as in a dense model's file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from ...models.comfyui_names import marks_of
from ...models.layout import layout_of
from ...models.standalone import GUARD_SHAPE, STRUCTURE_KEY, guard_name, structure_of
from ...models.stored_layout import STRUCTURE_TENSOR
from ...models.tensor_sources import Source, comfyui_sources
from ...system.json_text import json_text
from ...system.progress import Progress
from ...system.schemas import STRICT, Count, Finite, read_text
from ...system.tensor_files import MadeOnce, TensorEntry, write_tensor_stream
from ...system.two_of_four import INDICES, VALUES, compress, compressed_shapes
from .source import SparsitySource

SPARSITY_KEY = "ppcl_sparsity"


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What a file's metadata says about its sparsity."""

    __pydantic_config__ = STRICT

    pattern: str
    sparsity: Finite
    score: str
    granularity: str
    exchange: bool
    compensate: bool
    permuted: bool
    """whether channels are in another order than the teacher's, so that its LoRA files do not fit
    these layers"""
    timesteps: str
    calibration: str
    weights: Annotated[int, Field(ge=1, le=1 << 53)]
    """number of weights in the layers that were pruned"""
    dropped: Count
    """how many of `weights` are zero"""
    error: Finite
    """mean over these layers of the relative squared error of their outputs"""
    note: str = ""

    def to_json(self) -> str:
        return json_text(asdict(self))


def sparsity_of(metadata: dict[str, str]) -> Sparsity | None:
    """None for a file that was not made sparse. Raises ValueError for an entry that cannot be
    read."""
    if SPARSITY_KEY not in metadata:
        return None
    return read_text(Sparsity, metadata[SPARSITY_KEY], SPARSITY_KEY)


def write_sparse(
    path: Path,
    original: SparsitySource,
    tensors: dict[str, Source],
    compressed: set[str],
    dtype,
    sparsity: Sparsity,
) -> Path:
    """Writes a full model in ComfyUI's layout, which `Weights` also reads; a variant as a
    standalone with teacher indices.

    compressed: diffusers' names of the matrices that are 2:4.
    """
    extra, metadata = {}, {SPARSITY_KEY: sparsity.to_json(), "format": "pt"}
    guard = None
    plan, variant = original.plan, original.variant
    if plan is None or variant is None:
        joined = {name: original.architecture.to_comfyui(name, tensors).name for name in tensors}
        dense = {joined[name] for name in tensors if name not in compressed}
        tensors = comfyui_sources(original.architecture, tensors)
        compressed = set(tensors) - dense
        metadata["config"] = json_text(original.config)
        extra |= marks_of(original.architecture, original.config)
    else:
        structure = structure_of(plan, variant).to_json()
        extra[STRUCTURE_TENSOR] = torch.tensor(list(structure.encode()), dtype=torch.uint8)
        metadata[STRUCTURE_KEY] = structure
        guard = guard_name(plan, layout_of(plan, variant))
    guard = guard or min(compressed, default=None)
    if guard:
        extra[guard] = torch.zeros(GUARD_SHAPE, dtype=torch.uint8)
    write_tensor_stream(
        path, list(_entries(path.stem, tensors, compressed, dtype, extra)), metadata
    )
    return path


def _entries(
    name: str,
    tensors: dict[str, Source],
    compressed: set[str],
    dtype: torch.dtype,
    extra: dict[str, torch.Tensor],
) -> Iterator[TensorEntry]:
    bar = Progress(total=len(tensors), desc=name, unit="tensor")

    def counted(read: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def reading() -> torch.Tensor:
            bar.update()
            return read()

        return reading

    for key, source in tensors.items():
        if key not in compressed:
            yield TensorEntry(key, dtype, source.shape, counted(source.read))
            continue
        parts = MadeOnce(partial(_compressed, source, dtype))
        values, indices = compressed_shapes(source.shape)
        yield TensorEntry(key + VALUES, dtype, values, counted(partial(parts.take, VALUES)))
        yield TensorEntry(key + INDICES, torch.uint8, indices, partial(parts.take, INDICES))
    for key, tensor in extra.items():
        yield TensorEntry(key, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)


def _compressed(source: Source, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return dict(zip((VALUES, INDICES), compress(source.read().to(dtype)), strict=True))
