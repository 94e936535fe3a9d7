"""Losses of distillation; lower is better, 0 is equal.

On one stream's real tokens, [tokens, d] each: a sum over tokens divided by a size that the
teacher alone decides. `whole` makes the size of all rows of a batch from that of these rows
(`Processes.sum`), so that the losses of a batch's parts add up to the batch's. On an interval: the
sum over its streams. On a velocity: the relative error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch

from ...architectures import BlockState
from ...system.distributed import processes

TINY = 1e-12

Whole = Callable[[torch.Tensor], torch.Tensor]


def all_here(size: torch.Tensor) -> torch.Tensor:
    return size


def direction(
    student: torch.Tensor, teacher: torch.Tensor, whole: Whole = all_here
) -> torch.Tensor:
    """Mean of || s/|s| - t/|t| ||^2 = 2 - 2 cos (paper, equation 6). Magnitude is free."""
    errors = 2 - 2 * torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    return errors.sum() / whole(_tokens(teacher))


def direction_log_norm(
    student: torch.Tensor, teacher: torch.Tensor, whole: Whole = all_here
) -> torch.Tensor:
    """`direction` plus the squared difference of log norms: a residual stream's scale matters
    too."""
    norms = (torch.linalg.vector_norm(m, dim=-1).clamp_min(TINY).log() for m in (student, teacher))
    student_norm, teacher_norm = norms
    errors = (student_norm - teacher_norm).square()
    return direction(student, teacher, whole) + errors.sum() / whole(_tokens(teacher))


def relative_mse(
    student: torch.Tensor, teacher: torch.Tensor, whole: Whole = all_here
) -> torch.Tensor:
    """|| s - t ||^2 / || t ||^2 over all tokens."""
    return (student - teacher).square().sum() / whole(teacher.square().sum()).clamp_min(TINY)


def _tokens(stream: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(len(stream)), device=stream.device)


LOSSES = {"direction": direction, "direction_log_norm": direction_log_norm, "mse": relative_mse}


def velocity_loss(
    student: torch.Tensor, teacher: torch.Tensor, whole: Whole = all_here
) -> torch.Tensor:
    """|| s - t ||^2 / || t ||^2 over the batch: the measure that all methods are compared by."""
    return relative_mse(student.float(), teacher.float(), whole)


def interval_loss(
    loss: str, student: BlockState, target: BlockState, streams: tuple[str, ...]
) -> torch.Tensor:
    """Sum over streams of the loss on real tokens (paper, equation 6)."""
    pairs = [(student.real_tokens(s).float(), target.real_tokens(s).float()) for s in streams]
    losses = [LOSSES[loss](*pair, processes().sum) for pair in pairs]
    return reduce(torch.add, losses)


def tuning_loss(
    velocity: torch.Tensor,
    teacher: torch.Tensor,
    data: torch.Tensor | None = None,
    weight: float = 0.0,
) -> torch.Tensor:
    """|| v - v_T ||^2 / || v_T ||^2 + weight || v - d ||^2 / || d ||^2, d = noise - clean (flow
    matching)."""
    whole = processes().sum
    loss = velocity_loss(velocity, teacher, whole)
    return loss if data is None else loss + weight * velocity_loss(velocity, data, whole)
