"""HierarchicalPrune: remove the least harmful blocks of the later stack, train only what comes
behind the first cut.

From the description of the paper. Early blocks and the embedding layers keep the teacher's weights;
the rest learns the teacher's velocity, and with a small weight its states behind every cut.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ppcl_engine.algorithms.distillation.losses import relative_mse, velocity_loss
from ppcl_engine.architectures import BlockState

from .base import Pruned, Task, copied, distilled, lowest_of, without_each
from .chain import Budget, ExtraLoss

ELIGIBLE_SHARE = 2 / 3
FEATURE_WEIGHT = 1e-4


def select(task: Task, budget: Budget, eligible_share: float = ELIGIBLE_SHARE) -> tuple[int, ...]:
    """The lowest velocity errors without block i, among the last `eligible_share` of the blocks (of
    each kind)."""
    teacher = task.teacher
    eligible = [
        i
        for blocks, _ in task.quotas
        for i in blocks[len(blocks) - math.ceil(eligible_share * len(blocks)) :]
    ]
    scores = dict.fromkeys(eligible, 0.0)
    for inputs in task.selection_inputs():
        full, without = without_each(task, budget, inputs, eligible)
        with torch.no_grad():
            target = teacher.architecture.finish(teacher.outer, full)
            for i, state in without.items():
                scores[i] += float(
                    velocity_loss(teacher.architecture.finish(teacher.outer, state), target)
                )
    return lowest_of(task, scores)


def prune(task: Task, budget: Budget, removed: tuple[int, ...] | None = None) -> Pruned:
    pruned = copied(task, removed or select(task, budget))
    first_cut = pruned.removed[0]
    trained = [
        p for index, block in pruned.blocks.items() if index > first_cut for p in block.parameters()
    ]
    trained += final_parameters(task, pruned.outer)
    features = feature_loss(task, pruned)
    return distilled(task, budget, pruned, frozen=first_cut, trainable=trained, extra_loss=features)


def final_parameters(task: Task, outer: nn.Module) -> list[nn.Parameter]:
    """Parameters of `outer` that the final layer reads: those that a gradient from it reaches."""
    parameters = list(outer.requires_grad_(True).parameters())
    with torch.no_grad():
        state = task.teacher.embed(task.calibration.inputs(0))
    reached = torch.autograd.grad(
        task.teacher.architecture.finish(outer, state).sum(), parameters, allow_unused=True
    )
    outer.requires_grad_(False)
    return [p for p, gradient in zip(parameters, reached, strict=True) if gradient is not None]


def feature_loss(task: Task, pruned: Pruned) -> ExtraLoss:
    """1e-4 times the mean relative error of both streams behind the first kept block after every
    cut."""
    kept = list(pruned.blocks)
    sites = [
        position for position, index in enumerate(kept) if index > 0 and index - 1 in pruned.removed
    ]

    def loss(student: list[BlockState], teacher: list[BlockState]) -> torch.Tensor:
        errors = [
            relative_mse(s.real_tokens(stream).float(), t.real_tokens(stream).float())
            for position in sites
            for s, t in [(student[position + 1], teacher[kept[position] + 1])]
            for stream in task.teacher.used_streams(kept[position])
        ]
        return (
            FEATURE_WEIGHT
            * sum(errors, start=student[-1].image.new_zeros(()))
            / max(1, len(errors))
        )

    return loss
