"""Block influence: remove the blocks that turn their input least (ShortGPT, Men et al. 2024,
equation 1)."""

from __future__ import annotations

import torch

from .base import Pruned, Task, change_scores, copied, distilled, lowest_of
from .chain import Budget


def block_influence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """1 - mean over tokens of cos(x, f(x)); both [tokens, d]."""
    return 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()


def select(task: Task, budget: Budget) -> tuple[int, ...]:
    return lowest_of(task, change_scores(task, budget, block_influence))


def prune(task: Task, budget: Budget, removed: tuple[int, ...] | None = None) -> Pruned:
    return distilled(task, budget, copied(task, removed or select(task, budget)))
