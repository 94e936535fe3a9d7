"""Local patterns, hard gates with soft gradients, low-rank updates, the masked loss."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.baselines import tinyfusion
from benchmarks.baselines.chain import Budget, distil_loss, step_inputs
from benchmarks.baselines.tinyfusion import (
    Gates,
    add_low_rank,
    gated_loss,
    groups_of,
    masked_mse,
    patterns_of,
)
from ppcl_engine.algorithms.distillation.losses import relative_mse

from .conftest import IDENTITY


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_groups_cover_the_model_and_sum_to_what_is_removed(data):
    num_blocks = data.draw(st.integers(2, 60))
    remove = data.draw(st.integers(1, num_blocks - 1))
    groups = groups_of(num_blocks, remove)
    assert [i for blocks, _ in groups for i in blocks] == list(range(num_blocks))
    assert sum(count for _, count in groups) == remove
    assert all(0 <= count <= len(blocks) for blocks, count in groups)
    sizes, shares = (
        [len(blocks) for blocks, _ in groups],
        [count / len(blocks) for blocks, count in groups],
    )
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= 4
    assert (
        max(
            abs(share - remove / num_blocks) * size
            for share, size in zip(shares, sizes, strict=True)
        )
        <= 1
    )


@given(st.integers(1, 4), st.data())
@settings(deadline=None)
def test_every_pattern_removes_the_right_number(size, data):
    remove = data.draw(st.integers(0, size))
    patterns = patterns_of(size, remove)
    assert patterns.shape == (math.comb(size, remove), size) and len(
        {tuple(row) for row in patterns.tolist()}
    ) == len(patterns)
    assert ((patterns == 0).sum(1) == remove).all() and (
        (patterns == 1).sum(1) == size - remove
    ).all()


def test_gates_are_hard_with_soft_gradients():
    gates, generator = Gates(groups_of(10, 4)), torch.Generator().manual_seed(0)
    drawn = [gates.sample(4.0, generator) for _ in range(20)]
    assert all(set(gate.tolist()) == {0.0, 1.0} and int((gate == 0).sum()) == 4 for gate in drawn)
    assert len({tuple(gate.tolist()) for gate in drawn}) > 5
    (drawn[0] * torch.arange(10.0)).sum().backward()
    assert all(float(logits.grad.abs().sum()) > 0 for logits in gates.logits)


def test_the_average_decides():
    gates = Gates(groups_of(6, 2))
    with torch.no_grad():
        for logits in gates.logits:
            logits[-1] = 1.0
    gates.follow()
    expected = [blocks[-1] for blocks in gates.groups]
    assert gates.removed() == tuple(expected)
    gates.logits[0].data.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert gates.removed() == tuple(expected)
    for _ in range(2):
        gates.follow()
    assert gates.removed() == (0, expected[1])


def test_gates_are_removal(task):
    blocks = [task.teacher.block(i) for i in range(6)]
    inputs = step_inputs(task.calibration, task.seed, 3)
    gates = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    kept = [block for block, gate in zip(blocks, gates, strict=True) if gate]
    assert torch.equal(
        gated_loss(task, blocks, gates, 3),
        distil_loss(task.teacher, kept, task.teacher.outer, inputs),
    )
    assert float(gated_loss(task, blocks, torch.ones(6), 3)) == 0


def test_low_rank_updates_start_at_nothing_and_leave_the_weights(task, architecture, padded_inputs):
    block, state = task.teacher.block(1), task.teacher.embed(padded_inputs())
    updated = copy.deepcopy(block)
    added = add_low_rank(updated, 8, torch.Generator().manual_seed(0))
    assert torch.equal(
        architecture.run_block(updated, state).image, architecture.run_block(block, state).image
    )
    loss = architecture.run_block(updated, state).image.square().sum()
    linears = sum(isinstance(module, torch.nn.Linear) for module in block.modules())
    assert len(added) == 2 * linears and all(min(p.shape) <= 8 for p in added)
    loss.backward()
    assert all(p.grad is None for p in updated.parameters()) and added[1].grad.abs().sum() > 0


def test_massive_activations_are_left_out():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(50, 8, generator=generator)
    teacher[3, 2] = 1e4
    student = teacher.clone()
    student[3, 2] = -1e4
    student[7, 1] = 5e3
    assert float(masked_mse(student, teacher)) == 0 and float(relative_mse(student, teacher)) > 1
    student[5] += 1
    assert 0 < float(masked_mse(student, teacher)) < 0.1


def test_a_third_of_the_budget_learns_gates(task):
    budget = Budget(1000)
    removed = tinyfusion.select(task, budget)
    assert len(removed) == 2 and budget.spent == 333 // 24 * 24
    with pytest.raises(ValueError, match="gates need 24 block passes a step"):
        tinyfusion.select(task, Budget(40))


def test_gates_find_the_block_that_does_nothing(planted):
    task = dataclasses.replace(planted, remove=2)  # one of each half
    removed = tinyfusion.select(task, Budget(40 * 24), share=1.0)
    assert removed[1] == IDENTITY and removed[0] < 3
