"""Distillation losses on one stream's real tokens, [tokens, d] each; lower is better, 0 is equal."""

from __future__ import annotations

import torch

TINY = 1e-12


def direction(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean of || s/|s| - t/|t| ||^2 = 2 - 2 cos (paper, equation 6). Magnitude is free."""
    return (2 - 2 * torch.nn.functional.cosine_similarity(student, teacher, dim=-1)).mean()


def direction_log_norm(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """`direction` plus the squared difference of log norms: a residual stream's scale matters too."""
    norms = (torch.linalg.vector_norm(m, dim=-1).clamp_min(TINY).log() for m in (student, teacher))
    student_norm, teacher_norm = norms
    return direction(student, teacher) + (student_norm - teacher_norm).square().mean()


def relative_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """|| s - t ||^2 / || t ||^2 over all tokens."""
    return (student - teacher).square().sum() / teacher.square().sum().clamp_min(TINY)


LOSSES = {"direction": direction, "direction_log_norm": direction_log_norm, "mse": relative_mse}
