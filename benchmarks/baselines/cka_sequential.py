"""CKA sensitivity and sequential distillation: the first row of the paper's ablation ladder.

Blocks are ranked by what the model's final state loses without them. Each run of removed blocks
becomes one student with the kept block before it; the students learn end to end, each from what the
pruned model itself feeds it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ppcl_engine.algorithms.detection.alignment import cka, linear_gram
from ppcl_engine.algorithms.distillation.losses import direction
from ppcl_engine.algorithms.distillation.trainer import Trainer, cosine_schedule
from ppcl_engine.architectures import BlockState, Inputs

from .base import Pruned, Task, copied, lowest_of, without_each
from .chain import FORWARD, FORWARD_BACKWARD, WARM_UP, WEIGHT_DECAY, Budget, step_inputs

TOKENS = 4  # of every sample, evenly spaced: more of one picture's tokens say little new

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def select(task: Task, budget: Budget) -> tuple[int, ...]:
    """The lowest 1 - CKA(final image state without block i, the model's)."""
    rows: dict[int, list[torch.Tensor]] = {i: [] for i in range(task.teacher.num_blocks)}
    full_rows = []
    for inputs in task.selection_inputs():
        full, without = without_each(task, budget, inputs, range(task.teacher.num_blocks))
        full_rows.append(_few_tokens(task, full))
        for i, state in without.items():
            rows[i].append(_few_tokens(task, state))
    full_gram = linear_gram(torch.cat(full_rows))
    return lowest_of(
        task, {i: 1 - float(cka(linear_gram(torch.cat(r)), full_gram)) for i, r in rows.items()}
    )


def prune(task: Task, budget: Budget, removed: tuple[int, ...] | None = None) -> Pruned:
    removed, intervals, places = removed or select(task, budget), [], {}
    for blocks, _ in task.quotas:  # a student is of the kind of what it replaces
        runs, moved = runs_with_students(
            [blocks.index(i) for i in removed if i in blocks], len(blocks)
        )
        intervals += [(blocks[u], blocks[v]) for u, v in runs]
        places |= {blocks[u]: blocks[place] for u, place in moved.items()}
    return train_sequential(task, budget, intervals, places)


def runs_with_students(
    removed: Sequence[int], num_blocks: int
) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """(intervals [u, v] that one student each replaces, places that differ from u).

    A run goes with the kept block before it, so that block is u; a run at the very start with the
    kept block after it, whose index is then the student's place.
    """
    kept = [index for index in range(num_blocks) if index not in removed]
    starts = [0, *kept[1:]]
    ends = [after - 1 for after in kept[1:]] + [num_blocks - 1]
    intervals = [(u, v) for u, v in zip(starts, ends, strict=True) if v > u]
    return intervals, ({0: kept[0]} if kept[0] > 0 else {})


def train_sequential(
    task: Task,
    budget: Budget,
    intervals: Sequence[tuple[int, int]],
    places: dict[int, int] | None = None,
    students: dict[int, nn.Module] | None = None,
    loss: Loss = direction,
) -> Pruned:
    """One student for each interval [u, v], trained in the chain; everything else stays the
    teacher's.

    `places`: u -> the block whose index the student takes, u itself by default. `students`: u ->
    what to start from (it is copied), by default the teacher's block at the place.
    """
    intervals = sorted(intervals)
    place = {u: (places or {}).get(u, u) for u, _ in intervals}
    pruned = copied(task, [i for u, v in intervals for i in range(u, v + 1) if i != place[u]])
    for u, student in (students or {}).items():
        pruned.blocks[place[u]] = copy.deepcopy(student)
    chain = {u: (v, pruned.blocks[place[u]]) for u, v in intervals}
    trainer = Trainer(nn.ModuleList([student for _, student in chain.values()]), WEIGHT_DECAY)
    cost = sequential_cost(intervals)
    steps = budget.steps_for(cost)
    budget.spend(steps * cost)
    for step in range(steps):
        value = sequential_loss(task, chain, step_inputs(task.calibration, task.seed, step), loss)
        trainer.update(
            value,
            cosine_schedule(step, steps, task.learning_rate, WARM_UP),
            "sequential distillation",
        )
    trainer.module.requires_grad_(False)
    return Pruned(pruned.blocks, task.teacher.outer, pruned.removed, trainer.losses)


def sequential_cost(intervals: Sequence[tuple[int, int]]) -> int:
    """Block passes of a step: the teacher up to the last interval's end, the chain from the first
    student on."""
    first, end = intervals[0][0], intervals[-1][1] + 1
    chain = end - first - sum(v - u for u, v in intervals)
    return FORWARD * end + FORWARD_BACKWARD * chain


def sequential_loss(
    task: Task, chain: dict[int, tuple[int, nn.Module]], inputs: Inputs, loss: Loss = direction
) -> torch.Tensor:
    """Sum over intervals and used streams of the loss between the chain's and the teacher's state
    behind v.

    `chain`: u -> (v, student). Up to the first interval the chain is the teacher, so it starts
    there; kept blocks between students run too, and gradients flow back through them.
    """
    architecture, terms = task.teacher.architecture, []
    first, last = min(chain), max(v for v, _ in chain.values())
    state, end = None, -1  # the chain's state, and the last block that it has replaced
    with torch.no_grad():
        target = task.teacher.embed(inputs)
    for index, block in task.teacher.walk(0, last):
        if index == first:
            state = target
        if index in chain:
            end, student = chain[index]
            state = architecture.run_block(student, state)
        elif state is not None and index > end:
            state = architecture.run_block(block, state)
        with torch.no_grad():
            target = architecture.run_block(block, target)
        if index == end:
            terms += [
                loss(state.real_tokens(stream).float(), target.real_tokens(stream).float())
                for stream in task.teacher.used_streams(index)
            ]
    return sum(terms)


def _few_tokens(task: Task, state: BlockState) -> torch.Tensor:
    """[samples * tokens, d] of the final image state, at the same places of all samples."""
    image = task.teacher.architecture.final_image(task.teacher.outer, state)
    places = torch.linspace(0, image.shape[1] - 1, min(TOKENS, image.shape[1])).long()
    return image[:, places].flatten(0, 1)
