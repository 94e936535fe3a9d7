"""What holds for every baseline: blocks removed, teacher untouched, budget exact, same bits again,
a real model."""

import dataclasses

import pytest
import torch

from benchmarks.baselines import BASELINES, Budget, Task, model_of
from benchmarks.baselines.base import copied, lowest, without_each
from benchmarks.baselines.chain import distil_loss
from ppcl_engine.algorithms.distillation.losses import relative_mse
from ppcl_engine.models.streaming import Teacher, run_blocks, run_chain
from ppcl_engine.models.weights import Weights

from ...tiny.block_passes import count_passes

PASSES = 800


def snapshot(teacher) -> list[torch.Tensor]:
    modules = [teacher.outer, *(block for _, block in teacher.walk(0, teacher.num_blocks - 1))]
    return [p.clone() for module in modules for p in module.parameters()]


def bits(pruned) -> list[torch.Tensor]:
    return [p for module in (*pruned.blocks.values(), pruned.outer) for p in module.parameters()]


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@torch.no_grad()
def held_out_error(task, pruned) -> float:
    """Velocity error under noise that training did not draw."""
    inputs = [task.calibration.fresh(step % 2, 10_000 + step) for step in range(8)]
    return sum(
        float(distil_loss(task.teacher, list(pruned.blocks.values()), pruned.outer, row))
        for row in inputs
    )


def test_all_methods_are_there():
    names = "cka_sequential tinyfusion hierarchical_prune cosine mse every_second random_contiguous"
    assert set(BASELINES) == set(names.split())


@pytest.mark.parametrize("name", BASELINES)
def test_a_method(name, task, architecture, padded_inputs):
    before, budget = snapshot(task.teacher), Budget(PASSES)
    with count_passes() as counted:
        pruned = BASELINES[name](task, budget)
    assert counted.passes == budget.spent and PASSES - 40 < budget.spent <= PASSES
    assert equal(before, snapshot(task.teacher))
    kept = list(pruned.blocks)
    assert (
        len(pruned.removed) == 2
        and sorted([*kept, *pruned.removed]) == list(range(6))
        and kept == sorted(kept)
    )
    assert pruned.removed == tuple(sorted(pruned.removed))
    assert all(torch.isfinite(p).all() for p in bits(pruned))
    assert sum(pruned.losses[-6:]) < sum(pruned.losses[:6])
    owned = {p.data_ptr() for block in pruned.blocks.values() for p in block.parameters()}
    assert not owned & {
        p.data_ptr() for _, block in task.teacher.walk(0, 5) for p in block.parameters()
    }

    again = BASELINES[name](task, Budget(PASSES))
    assert (again.removed, again.losses) == (pruned.removed, pruned.losses) and equal(
        bits(again), bits(pruned)
    )

    assert held_out_error(task, pruned) < held_out_error(task, copied(task, pruned.removed))

    inputs, blocks = padded_inputs(seed=20), list(pruned.blocks.values())
    model = model_of(architecture, task.teacher.config, pruned, 6)
    velocity = run_chain(
        architecture, pruned.outer, blocks, architecture.embed(pruned.outer, inputs)
    )
    assert float(relative_mse(architecture.call(model, inputs), velocity)) < 1e-10
    assert not len(pruned.outer.transformer_blocks)


@pytest.mark.parametrize("name", BASELINES)
def test_removed_blocks_can_be_given(name, task):
    with count_passes() as counted:
        budget = Budget(60)
        pruned = BASELINES[name](task, budget, removed=(0, 3))
    assert counted.passes == budget.spent <= 60
    assert (pruned.removed, list(pruned.blocks), len(pruned.losses)) == (
        (0, 3),
        [1, 2, 4, 5],
        60 // _cost(name),
    )


def _cost(name: str) -> int:
    """(1-2 with one student) and (2-3): the teacher to block 3 and two students; else the teacher
    and four blocks."""
    return 4 + 3 * 2 if name == "cka_sequential" else 6 + 3 * 4


@pytest.mark.parametrize("name", BASELINES)
def test_a_budget_for_nothing_is_refused_or_trains_nothing(name, task):
    if name in ("every_second", "random_contiguous"):
        assert BASELINES[name](task, Budget(17)).losses == []
    else:
        with pytest.raises(ValueError, match="raise the budget"):
            BASELINES[name](task, Budget(5))


def test_a_streamed_teacher_gives_the_same_bits(task, teacher_file):
    streamed = dataclasses.replace(
        task, teacher=Teacher(Weights(teacher_file), torch.float32, "cpu", streamed=True)
    )
    for name in ("cka_sequential", "hierarchical_prune"):
        assert equal(
            bits(BASELINES[name](task, Budget(200))), bits(BASELINES[name](streamed, Budget(200)))
        )


def test_each_chain_lacks_its_block(task, architecture):
    inputs, budget, teacher = task.selection_inputs()[0], Budget(100), task.teacher
    with count_passes() as counted:
        full, without = without_each(task, budget, inputs, [1, 4, 5])
    assert counted.passes == budget.spent == 6 + 4 + 1 + 0
    blocks = [teacher.block(i) for i in range(6)]
    assert torch.equal(full.image, run_blocks(architecture, blocks, teacher.embed(inputs)).image)
    for i, state in without.items():
        assert torch.equal(
            state.image,
            run_blocks(architecture, blocks[:i] + blocks[i + 1 :], teacher.embed(inputs)).image,
        )
    assert list(without) == [1, 4, 5]


def test_the_lowest_scores_go_first_ties_by_index():
    assert lowest({0: 2.0, 1: 1.0, 2: 1.0, 3: 0.5}, 2) == (1, 3)
    with pytest.raises(ValueError, match="only 1 are eligible"):
        lowest({3: 0.0}, 2)


def test_a_task_that_cannot_be_is_refused(task):
    for remove in (0, 6):
        with pytest.raises(ValueError, match="cannot be removed"):
            dataclasses.replace(task, remove=remove)
    with pytest.raises(ValueError, match="3 batches of 2"):
        dataclasses.replace(task, selection_batches=3)
    assert isinstance(task, Task)


def test_a_teacher_in_bfloat16_is_refused(task, teacher_file):
    """Its blocks would be trained in bfloat16, where steps of the usual size are lost."""
    half = Teacher(Weights(teacher_file), torch.bfloat16, "cpu", streamed=False)
    with pytest.raises(
        ValueError,
        match="baselines train in float32, the teacher is torch.bfloat16; open it in float32",
    ):
        dataclasses.replace(task, teacher=half)
