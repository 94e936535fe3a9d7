"""A small LoRA of the tiny model, in PEFT's names."""

from __future__ import annotations

from pathlib import Path

import torch

from ppcl_engine.models.weights import Weights
from ppcl_engine.system.tensor_files import write_tensors

RANK = 2


def write_lora(
    path: Path,
    teacher: Path,
    blocks: list[int],
    maps: tuple[str, ...],
    outer: tuple[str, ...] = (),
    rank: int = RANK,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Pairs that change each of these maps, where a block has it, by about a tenth."""
    weights, generator = Weights(teacher), torch.Generator().manual_seed(0)
    prefixes = [weights.architecture.block_prefix(weights.config, block) for block in blocks]
    tensors = {}
    there = set(weights.keys())
    for module in [*outer, *(prefix + name for prefix in prefixes for name in maps)]:
        if f"{module}.weight" not in there:
            continue
        rows, columns = weights.shape(f"{module}.weight")
        down, up = (torch.randn(s, generator=generator) for s in ((rank, columns), (rows, rank)))
        tensors[f"transformer.{module}.lora_A.weight"] = down / columns**0.5
        tensors[f"transformer.{module}.lora_B.weight"] = up * 0.3 / rank**0.5
    write_tensors(path, tensors, {"format": "pt", **(metadata or {})})
    return path
