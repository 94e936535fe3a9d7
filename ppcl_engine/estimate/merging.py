"""What a merge would take, from the headers of its files."""

from __future__ import annotations

import math

from ..models.merging import layout_for, open_merge
from ..models.storing import BITS, is_block_matrix, stored_dtype
from ..settings.convert_settings import MergeConfig
from ..system.machine import free_disk
from .counts import FP32, stored_bytes

COPIES = 4  # of the largest tensor in float32: read, its change, a factor of that, the sum
BYTES_A_SECOND = 5e8  # of a disk


def print_merge(config: MergeConfig) -> None:
    """Prints what of each LoRA has a place, and what would be read, written and kept in memory.
    Raises ValueError as the merge itself would."""
    model, loras = open_merge(config)
    for lora in loras:
        print(lora.line)
    plain, few = 8 * stored_dtype(config.store).itemsize, BITS[config.store]
    sizes = {key: math.prod(source.shape) for key, source in model.sources.items()}
    written = sum(
        size * (few if is_block_matrix(key, model.sources[key].shape) else plain) / 8
        for key, size in sizes.items()
    )
    files = [config.path, *([config.base] if config.base else []), *(p for p, _ in config.loras)]
    read = sum(stored_bytes(path) for path in files)
    free = free_disk(config.run)
    print(
        f"merge into {config.path.name}, --layout {layout_for(config, model)} --store {config.store}: "
        f"{read / 1e9:.2f} GB read, {written / 1e9:.2f} GB written, {free / 1e9:.0f} GB are free, "
        f"about {_memory(model.sources, model.plan is not None) / 1e9:.2f} GB of memory, "
        f"{(read + written) / BYTES_A_SECOND / 60:.1f} minutes of reading and writing"
    )


def _memory(sources: dict, pruned: bool) -> int:
    """One tensor and its change at a time; of a pruned model, a whole block too."""
    sizes: dict[str, int] = {}
    for key, source in sources.items():
        block = ".".join(key.split(".")[:2])
        sizes[block] = sizes.get(block, 0) + math.prod(source.shape)
    largest = max(math.prod(source.shape) for source in sources.values())
    return FP32 * (COPIES * largest + (max(sizes.values()) if pruned else 0))
