"""What every baseline gets and returns, the passes that selections share, and plain training on the
velocity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import nn

from ppcl_engine.architectures import Architecture, BlockState, Inputs
from ppcl_engine.data.calibration import CalibrationSet
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.surgery import PassThrough

from .chain import FORWARD, Budget, ExtraLoss, distil_velocity, step_cost


@dataclass(frozen=True, kw_only=True)
class Task:
    """`remove`: blocks to remove; `selection_batches`: calibration batches that a selection may
    look at."""

    teacher: Teacher
    calibration: CalibrationSet
    remove: int
    learning_rate: float
    seed: int
    selection_batches: int = 2

    def __post_init__(self):
        if not 0 < self.remove < self.teacher.num_blocks:
            raise ValueError(
                f"{self.remove} of {self.teacher.num_blocks} blocks cannot be removed; take fewer"
            )
        if not 0 < self.selection_batches <= len(self.calibration):
            raise ValueError(
                f"selection needs {self.selection_batches} batches of {len(self.calibration)}"
            )
        if self.teacher.dtype is not torch.float32:  # the kept blocks are trained as they are
            raise ValueError(
                f"baselines train in float32, the teacher is {self.teacher.dtype}; open it in float32"
            )

    @property
    def quotas(self) -> tuple[tuple[range, int], ...]:
        """(blocks of one kind, how many of them to remove): the same share of each kind, so that
        every method removes the same parameters; the only block of its kind stays."""
        sections = self.teacher.architecture.sections(self.teacher.config)
        ends = list(accumulate((len(s) if len(s) > 1 else 0 for s in sections), initial=0))
        removed = [(2 * self.remove * end + ends[-1]) // (2 * ends[-1]) for end in ends]
        return tuple(
            (s, after - before)
            for s, before, after in zip(sections, removed, removed[1:], strict=False)
        )

    def selection_inputs(self) -> list[Inputs]:
        return [self.calibration.inputs(batch) for batch in range(self.selection_batches)]


@dataclass(frozen=True)
class Pruned:
    """blocks: teacher index -> the block that stays, its own copy, ascending; outer: a copy if it
    was trained;
    removed: the other indices, ascending; losses: of every step."""

    blocks: dict[int, nn.Module]
    outer: nn.Module
    removed: tuple[int, ...]
    losses: list[float] = field(default_factory=list)


def model_of(
    architecture: Architecture, config: dict, pruned: Pruned, num_blocks: int
) -> nn.Module:
    """diffusers' model of the teacher's depth, pass-through blocks in removed places."""
    gap = PassThrough(architecture.block_arguments, architecture.block_returns)
    blocks = [pruned.blocks.get(index, gap) for index in range(num_blocks)]
    return architecture.assemble(copy.deepcopy(pruned.outer), config, blocks)


def lowest(scores: dict[int, float], count: int) -> tuple[int, ...]:
    """The `count` blocks with the lowest scores, ascending. Raises ValueError when there are not so
    many."""
    if count > len(scores):
        raise ValueError(
            f"{count} blocks cannot be removed, only {len(scores)} are eligible; remove fewer"
        )
    return tuple(sorted(sorted(scores, key=lambda index: (scores[index], index))[:count]))


def lowest_of(task: Task, scores: dict[int, float]) -> tuple[int, ...]:
    """`lowest` among the blocks of each kind."""
    chosen = [
        lowest({i: scores[i] for i in blocks if i in scores}, count)
        for blocks, count in task.quotas
    ]
    return tuple(index for part in chosen for index in part)


def change_scores(
    task: Task, budget: Budget, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> dict[int, float]:
    """Mean over batches and used streams of change(input, output), both [real tokens, d], for every
    block.

    One pass through the teacher.
    """
    teacher, inputs = task.teacher, task.selection_inputs()
    budget.spend(FORWARD * teacher.num_blocks * len(inputs))
    scores = {}
    with torch.no_grad():
        states = [teacher.embed(row) for row in inputs]
        for index, block in teacher.walk(0, teacher.num_blocks - 1):
            outputs = [teacher.architecture.run_block(block, state) for state in states]
            values = [
                float(change(before.real_tokens(stream).float(), after.real_tokens(stream).float()))
                for before, after in zip(states, outputs, strict=True)
                for stream in teacher.used_streams(index)
            ]
            scores[index], states = sum(values) / len(values), outputs
    return scores


def without_each(
    task: Task, budget: Budget, inputs: Inputs, eligible: Sequence[int]
) -> tuple[BlockState, dict[int, BlockState]]:
    """Final states of the model and of the model without block i, for every eligible i, in one
    walk.

    A chain branches off at every eligible block; chain i runs the blocks behind i only.
    """
    teacher, last = task.teacher, task.teacher.num_blocks - 1
    budget.spend(FORWARD * (teacher.num_blocks + sum(last - i for i in eligible)))
    chains: dict[int, BlockState] = {}
    with torch.no_grad():
        state = teacher.embed(inputs)
        for index, block in teacher.walk(0, last):
            chains = {
                i: teacher.architecture.run_block(block, chain) for i, chain in chains.items()
            }
            if index in eligible:
                chains[index] = state
            state = teacher.architecture.run_block(block, state)
    return state, chains


def copied(task: Task, removed: Iterable[int]) -> Pruned:
    """Copies of the kept blocks and of the outer layers, untrained."""
    removed = tuple(sorted(removed))
    kept = [index for index in range(task.teacher.num_blocks) if index not in removed]
    blocks = {index: copy.deepcopy(task.teacher.block(index)) for index in kept}
    return Pruned(blocks, copy.deepcopy(task.teacher.outer), removed)


def distilled(
    task: Task,
    budget: Budget,
    pruned: Pruned,
    *,
    frozen: int = 0,
    trainable: Iterable[nn.Parameter] | None = None,
    extra_loss: ExtraLoss | None = None,
) -> Pruned:
    """Trains the copies on the teacher's velocity for as many steps as the budget has left.

    `frozen`: how many of the first kept blocks gradients do not reach.
    """
    cost = step_cost(task.teacher.num_blocks, len(pruned.blocks), frozen)
    steps = budget.steps_for(cost)
    budget.spend(steps * cost)
    losses = distil_velocity(
        task.teacher,
        list(pruned.blocks.values()),
        pruned.outer,
        task.calibration,
        steps=steps,
        learning_rate=task.learning_rate,
        seed=task.seed,
        trainable=trainable,
        extra_loss=extra_loss,
    )
    return replace(pruned, losses=losses)
