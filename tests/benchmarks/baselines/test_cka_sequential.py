"""Runs and their students, and the sequential chain against the same chain written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.baselines.chain import Budget, step_inputs
from benchmarks.baselines.cka_sequential import (
    runs_with_students,
    sequential_cost,
    sequential_loss,
    train_sequential,
)
from ppcl_engine.algorithms.distillation.losses import direction, relative_mse
from ppcl_engine.models.streaming import run_blocks

from ...tiny.block_passes import count_passes


def test_runs_go_with_the_kept_block_before_them():
    assert runs_with_students((2, 3, 5), 8) == ([(1, 3), (4, 5)], {})
    assert runs_with_students((6, 7), 8) == ([(5, 7)], {})
    assert runs_with_students((0, 1, 4), 6) == ([(0, 2), (3, 4)], {0: 2})
    assert runs_with_students((0, 1, 3), 6) == ([(0, 3)], {0: 2})


@given(st.integers(2, 30), st.data())
@settings(max_examples=60, deadline=None)
def test_every_removed_block_is_in_one_interval_with_one_student(num_blocks, data):
    indices = st.sets(st.integers(0, num_blocks - 1), min_size=1, max_size=num_blocks - 1)
    removed = tuple(sorted(data.draw(indices)))
    intervals, places = runs_with_students(removed, num_blocks)
    students = [places.get(u, u) for u, _ in intervals]
    inside = [i for u, v in intervals for i in range(u, v + 1)]
    assert len(inside) == len(set(inside)) and sorted(set(inside) - set(students)) == list(removed)


@pytest.mark.parametrize("loss", [direction, relative_mse])
def test_the_loss_is_that_of_the_chain_written_out(loss, task, architecture):
    teacher, inputs = task.teacher, step_inputs(task.calibration, 0, 0)
    blocks = [teacher.block(i) for i in range(6)]
    with count_passes() as counted:
        value = sequential_loss(task, {1: (2, blocks[1]), 4: (5, blocks[4])}, inputs, loss)
    # nothing is trained here, so the chain costs its forwards
    assert counted.passes == 6 + 1 + 1 + 1
    assert sequential_cost([(1, 2), (4, 5)]) == 6 + 3 * (1 + 1 + 1)
    whole = []
    run_blocks(architecture, blocks, teacher.embed(inputs), whole)
    first = run_blocks(architecture, blocks[:2], teacher.embed(inputs))
    second = run_blocks(architecture, blocks[3:5], first)
    expected = sum(loss(first.real_tokens(s), whole[3].real_tokens(s)) for s in ("image", "text"))
    expected = expected + loss(second.real_tokens("image"), whole[6].real_tokens("image"))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_intervals_found_elsewhere(task):
    budget = Budget(400)
    pruned = train_sequential(task, budget, [(3, 4), (0, 1)], loss=relative_mse)
    assert (pruned.removed, list(pruned.blocks)) == (
        (1, 4),
        [0, 2, 3, 5],
    ) and budget.left < sequential_cost([(0, 4)]) + 9
    assert pruned.outer is task.teacher.outer
    changed = [
        i
        for i, block in pruned.blocks.items()
        if not all(map(torch.equal, block.parameters(), task.teacher.block(i).parameters()))
    ]
    assert changed == [0, 3] and pruned.losses[-1] < pruned.losses[0]


def test_students_start_from_what_is_given_and_it_stays(task):
    student = task.teacher.block(2)
    before = [p.clone() for p in student.parameters()]
    pruned = train_sequential(task, Budget(0), [(1, 2)], students={1: student})
    assert all(map(torch.equal, pruned.blocks[1].parameters(), student.parameters()))
    train_sequential(task, Budget(50), [(1, 2)], students={1: student})
    assert (
        all(map(torch.equal, before, student.parameters()))
        and not next(student.parameters()).requires_grad
    )
