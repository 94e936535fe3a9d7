"""Tensors in training that may be divided among processes (FSDP2's DTensors): what of them is here,
their gradients' norm, their files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...system.distributed import processes
from ...system.tensor_files import TensorEntry, write_tensor_stream

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

LEAST = 1e-6  # as torch's clip_grad_norm_ has it


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of it."""
    return _shard(tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, gathered if it is sharded; then all processes have to call this."""
    return _shard(tensor).full_tensor() if is_sharded(tensor) else tensor


def like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, placed as the other one is: its shard and device."""
    if not is_sharded(other):
        return tensor.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    shard, tensor = _shard(other), tensor.to(local(other).device)
    # every process has all of it, so nothing is sent
    return distribute_tensor(tensor, shard.device_mesh, shard.placements, src_data_rank=None)


def clip(parameters: Iterable[nn.Parameter], most: float = 1.0) -> float:
    """The norm of all these gradients together, which are then scaled down to `most`. Of sharded
    ones all processes have to call this for the same parameters; one number is exchanged."""
    trained = list(parameters)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    if not any(map(is_sharded, gradients)):
        return float(nn.utils.clip_grad_norm_(trained, most))
    shards = [local(gradient) for gradient in gradients]
    norm = processes().sum(nn.utils.get_total_norm(shards).square()).sqrt()
    scale = (most / (norm + LEAST)).clamp(max=1.0)
    for shard in shards:
        shard.mul_(scale)
    return float(norm)


def write_whole(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A file of the whole tensors, each gathered when its turn comes. All processes that share a
    training have to call this; the main one writes."""
    entries = [
        TensorEntry(name, t.dtype, tuple(t.shape), partial(whole, t)) for name, t in tensors.items()
    ]
    write_together(path, entries, metadata)


def write_together(path: Path, entries: list[TensorEntry], metadata: dict[str, str]) -> None:
    """The main process writes; reading an entry may need all of them."""
    if processes().writes:
        write_tensor_stream(path, entries, metadata)
        return
    for entry in entries:
        entry.read()


def _shard(tensor: torch.Tensor) -> DTensor:
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor
