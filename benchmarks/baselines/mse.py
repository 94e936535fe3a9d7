"""Remove the blocks whose output differs least from their input in squares (FLUX.1 Lite's
ranking)."""

from __future__ import annotations

import torch

from ppcl_engine.algorithms.distillation.losses import relative_mse

from .base import Pruned, Task, change_scores, copied, distilled, lowest_of
from .chain import Budget


def relative_change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """|| f(x) - x ||^2 / || x ||^2; both [tokens, d]."""
    return relative_mse(after, before)


def select(task: Task, budget: Budget) -> tuple[int, ...]:
    return lowest_of(task, change_scores(task, budget, relative_change))


def prune(task: Task, budget: Budget, removed: tuple[int, ...] | None = None) -> Pruned:
    return distilled(task, budget, copied(task, removed or select(task, budget)))
