"""TinyFusion: learn which blocks to remove by how well the rest can recover, then distil with
masked features.

From the paper's description (Fang et al. 2024, "Learned shallow diffusion transformers"). Blocks
form local groups; in each, a hard Gumbel-softmax gate draws one pattern of removed blocks, while
low-rank updates stand for the training that will follow. A third of the budget learns gates, the
rest trains what stays.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import nn

from ppcl_engine.algorithms.distillation.losses import relative_mse, velocity_loss
from ppcl_engine.algorithms.distillation.part_optimizer import BETAS
from ppcl_engine.algorithms.distillation.trainer import Diverged, cosine_schedule
from ppcl_engine.architectures import BlockState
from ppcl_engine.models.streaming import teacher_velocity

from .base import Pruned, Task, copied, distilled
from .chain import WARM_UP, WEIGHT_DECAY, Budget, ExtraLoss, step_cost, step_inputs

GROUP = 4  # blocks, about
GATE_SHARE = 1 / 3
TAU = (4.0, 0.1)
SCALE = 100.0
GATE_RATE = 10.0
RANK = 8
EMA = 0.99
FEATURE_WEIGHT = 0.1
SIGMAS = 2.0


def groups_of(num_blocks: int, remove: int) -> list[tuple[range, int]]:
    """(blocks, how many of them to remove): groups of nearly equal size and share, that sum to
    `remove`."""
    count = -(-num_blocks // GROUP)
    ends = [num_blocks * j // count for j in range(count + 1)]
    # the nearest whole number
    removed = [(2 * remove * end + num_blocks) // (2 * num_blocks) for end in ends]
    return [(range(ends[j], ends[j + 1]), removed[j + 1] - removed[j]) for j in range(count)]


def task_groups(task: Task) -> list[tuple[range, int]]:
    """`groups_of` the blocks of each kind."""
    return [
        (range(blocks.start + group.start, blocks.start + group.stop), removed)
        for blocks, count in task.quotas
        for group, removed in groups_of(len(blocks), count)
    ]


def patterns_of(size: int, remove: int) -> torch.Tensor:
    """[patterns, size] of ones (kept) and zeros: every way to remove `remove` of `size` blocks."""
    choices = list(combinations(range(size), remove))
    patterns = torch.ones(len(choices), size)
    for row, removed in zip(patterns, choices, strict=True):
        row[list(removed)] = 0
    return patterns


class Gates(nn.Module):
    """One learned distribution over patterns for each group, and its moving average."""

    def __init__(self, groups: Sequence[tuple[range, int]]):
        super().__init__()
        self.groups = [blocks for blocks, _ in groups]
        self.patterns = [patterns_of(len(blocks), count) for blocks, count in groups]
        self.logits = nn.ParameterList(
            nn.Parameter(torch.zeros(len(patterns))) for patterns in self.patterns
        )
        self.average = [torch.zeros(len(patterns)) for patterns in self.patterns]

    def sample(self, tau: float, generator: torch.Generator) -> torch.Tensor:
        """[blocks] of ones and zeros with the gradient of the soft choice (Jang et al. 2017,
        straight-through)."""
        rows = []
        for logits, patterns in zip(self.logits, self.patterns, strict=True):
            noise = torch.empty(len(patterns)).exponential_(generator=generator).log().neg()
            soft = torch.softmax((SCALE * logits + noise) / tau, dim=0)
            hard = nn.functional.one_hot(soft.argmax(), len(patterns)).to(soft)
            rows.append((hard + (soft - soft.detach())) @ patterns)
        return torch.cat(rows)

    @torch.no_grad()
    def follow(self) -> None:
        """The moving average takes in the present probabilities."""
        for average, logits in zip(self.average, self.logits, strict=True):
            average.lerp_(torch.softmax(SCALE * logits, dim=0), 1 - EMA)

    def removed(self) -> tuple[int, ...]:
        """The most probable pattern of every group, as removed blocks, ascending."""
        best = [p[average.argmax()] for p, average in zip(self.patterns, self.average, strict=True)]
        return tuple(index for index, kept in enumerate(torch.cat(best).tolist()) if not kept)


def add_low_rank(block: nn.Module, rank: int, generator: torch.Generator) -> list[nn.Parameter]:
    """y = W x + B A x on every linear map of the block, B zero at first (Hu et al. 2021). Returns
    all A and B."""
    added = []
    for linear in [module for module in block.modules() if isinstance(module, nn.Linear)]:
        down = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        a = nn.Parameter(down.to(linear.weight))
        b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        linear.register_forward_hook(
            lambda _, inputs, output, a=a, b=b: output + inputs[0] @ a.T @ b.T
        )
        added += [a, b]
    return added


def select(task: Task, budget: Budget, share: float = GATE_SHARE) -> tuple[int, ...]:
    """Trains gates and low-rank updates on the velocity with `share` of what the budget has
    left."""
    teacher, gates = task.teacher, Gates(task_groups(task))
    cost = step_cost(teacher.num_blocks, teacher.num_blocks)
    steps = Budget(int(share * budget.left)).steps_for(cost)
    if not steps:
        raise ValueError(
            f"gates need {cost} block passes a step, {share:.0%} of {budget.left} is less; raise the budget"
        )
    budget.spend(steps * cost)
    generator = torch.Generator().manual_seed(task.seed)
    blocks = [copy.deepcopy(teacher.block(index)) for index in range(teacher.num_blocks)]
    updates = [parameter for block in blocks for parameter in add_low_rank(block, RANK, generator)]
    optimizer = torch.optim.AdamW(
        [
            {"params": updates, "rate": 1.0},
            {"params": gates.parameters(), "rate": GATE_RATE, "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
    )
    for step in range(steps):
        tau = TAU[0] + (TAU[1] - TAU[0]) * step / max(1, steps - 1)
        loss = gated_loss(task, blocks, gates.sample(tau, generator), step)
        _update(optimizer, loss, cosine_schedule(step, steps, task.learning_rate, WARM_UP))
        gates.follow()
    return gates.removed()


def gated_loss(
    task: Task, blocks: Sequence[nn.Module], gates: torch.Tensor, step: int
) -> torch.Tensor:
    """Velocity error of the model whose block i adds gates[i] times what it would add."""
    architecture, inputs = task.teacher.architecture, step_inputs(task.calibration, task.seed, step)
    with torch.no_grad():
        target = teacher_velocity(task.teacher, inputs)
        state = task.teacher.embed(inputs)
    for block, gate in zip(blocks, gates.to(state.image), strict=True):
        state = _between(state, architecture.run_block(block, state), gate)
    return velocity_loss(architecture.finish(task.teacher.outer, state), target)


def _between(before: BlockState, after: BlockState, gate: torch.Tensor) -> BlockState:
    return after.with_streams(
        torch.lerp(before.image, after.image, gate), torch.lerp(before.text, after.text, gate)
    )


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, learning_rate: float) -> None:
    """One step, every group at its own multiple of the learning rate and with its gradients clipped
    to a norm of 1.

    Raises Diverged, before the weights are touched, when the loss is not finite.
    """
    if not math.isfinite(float(loss.detach())):
        raise Diverged("the loss of the gates is not finite; lower --learning-rate")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def prune(task: Task, budget: Budget, removed: tuple[int, ...] | None = None) -> Pruned:
    pruned = copied(task, removed or select(task, budget))
    return distilled(task, budget, pruned, extra_loss=masked_features(task, pruned))


def masked_features(task: Task, pruned: Pruned) -> ExtraLoss:
    """0.1 times the mean masked error of both streams behind every group but the last, which the
    velocity covers."""
    ends = [blocks.stop for blocks, _ in task_groups(replace(task, remove=len(pruned.removed)))][
        :-1
    ]
    sites = [(sum(index < end for index in pruned.blocks), end) for end in ends]

    def loss(student: list[BlockState], teacher: list[BlockState]) -> torch.Tensor:
        errors = [
            masked_mse(
                student[position].real_tokens(stream).float(),
                teacher[end].real_tokens(stream).float(),
            )
            for position, end in sites
            for stream in task.teacher.used_streams(end - 1)
        ]
        return (
            FEATURE_WEIGHT
            * sum(errors, start=student[-1].image.new_zeros(()))
            / max(1, len(errors))
        )

    return loss


def masked_mse(
    student: torch.Tensor, teacher: torch.Tensor, sigmas: float = SIGMAS
) -> torch.Tensor:
    """relative_mse over entries of [tokens, d] within `sigmas` deviations of the mean in both:
    massive activations would rule the loss and are left out."""
    with torch.no_grad():
        kept = torch.ones_like(teacher, dtype=torch.bool)
        for x in (student, teacher):
            kept &= (x - x.mean()).abs() <= sigmas * x.std()
    return relative_mse(student[kept], teacher[kept])
