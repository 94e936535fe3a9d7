"""Remove random runs of two to four neighbours, a kept block between any two; never the first or
last block.

What contiguity is worth without choosing where.
"""

from __future__ import annotations

import torch

from .base import Pruned, Task, copied, distilled
from .chain import Budget

SHORTEST, LONGEST = 2, 4


def random_runs(num_blocks: int, remove: int, seed: int) -> tuple[int, ...]:
    """Removed blocks, ascending; a single block is a run of its own. Raises ValueError when they do
    not fit."""
    generator = torch.Generator().manual_seed(seed)
    fewest = -(-remove // LONGEST)
    spare = num_blocks - 2 - remove  # kept blocks between the first and the last
    most = min(max(1, remove // SHORTEST), spare + 1)
    if spare < 0 or fewest > most:
        raise ValueError(
            f"runs of {LONGEST} cannot remove {remove} of {num_blocks} blocks; remove fewer"
        )
    count = int(torch.randint(fewest, most + 1, (), generator=generator))
    lengths = _lengths(remove, count, generator)
    # kept blocks in front
    slots = torch.randperm(spare + 1, generator=generator)[:count].sort().values.tolist()
    removed, before = [], 0
    for length, slot in zip(lengths, slots, strict=True):
        start = 1 + slot + before
        removed += range(start, start + length)
        before += length
    return tuple(removed)


def _lengths(remove: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` lengths within bounds that sum to `remove`, the surplus over the shortest dealt at
    random."""
    lengths = [min(SHORTEST, remove)] * count
    while sum(lengths) < remove:
        open_runs = [i for i, length in enumerate(lengths) if length < LONGEST]
        lengths[open_runs[int(torch.randint(len(open_runs), (), generator=generator))]] += 1
    return lengths


def select(task: Task, budget: Budget) -> tuple[int, ...]:
    return tuple(
        blocks[i]
        for blocks, count in task.quotas
        if count
        for i in random_runs(len(blocks), count, task.seed)
    )


def prune(task: Task, budget: Budget, removed: tuple[int, ...] | None = None) -> Pruned:
    return distilled(task, budget, copied(task, removed or select(task, budget)))
