"""Remove blocks at even distances, never the first or the last: every second one at half the
depth."""

from __future__ import annotations

from .base import Pruned, Task, copied, distilled
from .chain import Budget


def evenly_spaced(num_blocks: int, remove: int) -> tuple[int, ...]:
    """The middles of `remove` equal parts of blocks 1..num_blocks-2. Raises ValueError when those
    are too few."""
    inner = num_blocks - 2
    if remove > inner:
        raise ValueError(
            f"{remove} blocks cannot be removed between the first and last of {num_blocks}; remove fewer"
        )
    return tuple(1 + (2 * part + 1) * inner // (2 * remove) for part in range(remove))


def select(task: Task, budget: Budget) -> tuple[int, ...]:
    return tuple(
        blocks[i]
        for blocks, count in task.quotas
        if count
        for i in evenly_spaced(len(blocks), count)
    )


def prune(task: Task, budget: Budget, removed: tuple[int, ...] | None = None) -> Pruned:
    return distilled(task, budget, copied(task, removed or select(task, budget)))
