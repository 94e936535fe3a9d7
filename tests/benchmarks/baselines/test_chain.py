"""A chain of the teacher's own blocks is the teacher; distillation and its budget, counted and to
the bit."""

import copy

import pytest
import torch

from benchmarks.baselines import chain
from benchmarks.baselines.chain import Budget, distil_loss, distil_velocity, step_cost
from ppcl_engine.algorithms.distillation.losses import relative_mse
from ppcl_engine.models import streaming
from ppcl_engine.models.streaming import Teacher, run_blocks, run_chain
from ppcl_engine.models.weights import Weights

from ...tiny.block_passes import count_passes


@pytest.fixture(scope="module")
def teacher(teacher_file):
    return Teacher(Weights(teacher_file), torch.float32, "cpu", streamed=False)


@pytest.fixture(scope="module")
def calibration(teacher_file, calibration_of):
    return calibration_of(teacher_file, batches=2)


@pytest.fixture
def student(teacher):
    """Copies of four blocks and of the outer layers."""
    return [copy.deepcopy(teacher.block(i)) for i in (0, 1, 3, 5)], copy.deepcopy(teacher.outer)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_teachers_own_blocks_are_the_teacher(
    streamed, teacher_file, architecture, model, padded_inputs
):
    teacher = Teacher(Weights(teacher_file), torch.float32, "cpu", streamed)
    inputs, seen = padded_inputs(), []
    expected = architecture.call(model, inputs)
    blocks = [teacher.block(i) for i in range(teacher.num_blocks)]
    velocity = run_chain(architecture, teacher.outer, blocks, teacher.embed(inputs), seen)
    assert float(relative_mse(velocity, expected)) <= 1e-10
    assert torch.equal(streaming.teacher_velocity(teacher, inputs), velocity)
    assert len(seen) == 7 and torch.equal(seen[0].image, teacher.embed(inputs).image)
    assert torch.equal(architecture.finish(teacher.outer, seen[-1]), velocity)
    assert torch.equal(run_blocks(architecture, blocks[:3], seen[0]).text, seen[3].text)
    assert float(distil_loss(teacher, blocks, teacher.outer, inputs)) == 0


def test_other_outer_layers_embed_without_touching_the_teacher(teacher, padded_inputs):
    outer = copy.deepcopy(teacher.outer)
    with torch.no_grad():
        outer.img_in.bias += 1
    before = teacher.embed(padded_inputs()).image
    moved = streaming.embed_with(teacher, outer, padded_inputs()).image
    assert torch.allclose(moved, before + 1, atol=1e-5) and torch.equal(
        teacher.embed(padded_inputs()).image, before
    )


def test_a_budget_counts_and_refuses():
    budget = Budget(100)
    budget.spend(30)
    assert (budget.total, budget.spent, budget.left) == (100, 30, 70)
    assert [budget.steps_for(cost) for cost in (18, 70, 71)] == [3, 1, 0]
    with pytest.raises(ValueError, match="71 block passes are needed and 70 of 100 are left"):
        budget.spend(71)
    assert budget.left == 70
    assert step_cost(6, 4) == 6 + 3 * 4 and step_cost(6, 4, frozen=2) == 6 + 2 + 3 * 2


@pytest.mark.parametrize("steps", [1, 3])
def test_the_cost_of_a_step_is_what_runs(steps, teacher, student, calibration):
    blocks, outer = student
    settings = {"steps": steps, "learning_rate": 1e-3, "seed": 0}
    with count_passes() as counted:
        distil_velocity(teacher, blocks, outer, calibration, **settings)
    assert counted.passes == steps * step_cost(6, 4)
    with count_passes() as counted:
        distil_velocity(
            teacher, blocks, outer, calibration, trainable=blocks[2].parameters(), **settings
        )
    assert counted.passes == steps * step_cost(6, 4, frozen=2)


def weights(*modules) -> list[torch.Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(first, second) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


def test_distillation_lowers_the_loss_and_is_a_function_of_the_seed(teacher, student, calibration):
    twin, other = copy.deepcopy(student), copy.deepcopy(student)
    fixed = weights(teacher.outer, *(teacher.block(i) for i in range(6)))
    before, seen = weights(*student[0], student[1]), []
    settings = {"steps": 24, "learning_rate": 3e-3}
    losses = distil_velocity(
        teacher, *student, calibration, seed=5, progress=lambda *done: seen.append(done), **settings
    )
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]) and seen == list(enumerate(losses, start=1))
    assert losses == distil_velocity(teacher, *twin, calibration, seed=5, **settings)
    assert losses != distil_velocity(teacher, *other, calibration, seed=6, **settings)
    after = weights(*student[0], student[1])
    assert all(same(after, weights(*twin[0], twin[1]))) and not all(same(after, before))
    assert all(same(fixed, weights(teacher.outer, *(teacher.block(i) for i in range(6)))))
    assert not any(p.requires_grad for block in student[0] for p in block.parameters())


def test_only_what_is_named_is_trained_and_extra_losses_count(teacher, student, calibration):
    blocks, outer = student
    before = weights(outer, *blocks[:1], *blocks[2:])
    moved = weights(blocks[1])
    sizes = []

    def extra(student_states, teacher_states):
        sizes.append((len(student_states), len(teacher_states)))
        return student_states[2].image.square().mean()

    plain = float(distil_loss(teacher, blocks, outer, chain.step_inputs(calibration, 3, 0)))
    settings = {"steps": 2, "learning_rate": 1e-3, "seed": 3, "extra_loss": extra}
    losses = distil_velocity(
        teacher, blocks, outer, calibration, trainable=blocks[1].parameters(), **settings
    )
    assert sizes == [(5, 7)] * 2 and losses[0] > plain
    assert all(same(before, weights(outer, *blocks[:1], *blocks[2:])))
    assert not all(same(moved, weights(blocks[1])))


def test_a_streamed_teacher_gives_the_same_bits(teacher, teacher_file, student, calibration):
    twin = copy.deepcopy(student)
    streamed = Teacher(Weights(teacher_file), torch.float32, "cpu", streamed=True)
    settings = {"steps": 2, "learning_rate": 1e-3, "seed": 0}
    losses = distil_velocity(teacher, *student, calibration, **settings)
    assert losses == distil_velocity(streamed, *twin, calibration, **settings)
    assert all(same(weights(*student[0], student[1]), weights(*twin[0], twin[1])))
