"""Losses against their closed forms, and what each of them leaves free."""

import math
from typing import get_args, get_type_hints

import pytest
import torch

from ppcl_engine.algorithms.distillation.losses import (
    LOSSES,
    direction,
    direction_log_norm,
    relative_mse,
)
from ppcl_engine.settings.prune_settings import DistillDepthConfig

TEACHER = torch.tensor([[3.0, 4.0], [0.0, 2.0]])


def test_direction_is_the_distance_of_unit_vectors():
    """60 degrees on the first token, 180 on the second: (2 - 2/2 + 2 + 2) / 2."""
    turn = torch.tensor(
        [
            [math.cos(math.pi / 3), -math.sin(math.pi / 3)],
            [math.sin(math.pi / 3), math.cos(math.pi / 3)],
        ]
    )
    student = torch.stack([turn @ TEACHER[0] * 7, -TEACHER[1]])
    assert float(direction(student, TEACHER)) == pytest.approx(2.5)
    unit = [torch.nn.functional.normalize(m, dim=-1) for m in (student, TEACHER)]
    assert float(direction(student, TEACHER)) == pytest.approx(
        float((unit[0] - unit[1]).square().sum(-1).mean())
    )


def test_log_norm_adds_the_squared_log_of_the_ratio():
    scales = torch.tensor([[math.e], [math.e**3]])
    assert float(direction_log_norm(TEACHER * scales, TEACHER)) == pytest.approx(
        (1 + 9) / 2, rel=1e-5
    )


def test_relative_mse():
    assert float(relative_mse(TEACHER * 1.5, TEACHER)) == pytest.approx(0.25)
    assert float(relative_mse(torch.zeros_like(TEACHER), TEACHER)) == 1


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_equal_is_zero_and_worse_is_positive(loss):
    assert float(loss(TEACHER, TEACHER)) == pytest.approx(0, abs=1e-6)
    assert float(loss(TEACHER.flip(0), TEACHER)) > 0.1


def test_only_direction_ignores_the_scale():
    losses = {name: float(loss(TEACHER * 3, TEACHER)) for name, loss in LOSSES.items()}
    assert losses["direction"] == pytest.approx(0, abs=1e-6)
    assert losses["direction_log_norm"] == pytest.approx(math.log(3) ** 2) and losses[
        "mse"
    ] == pytest.approx(4)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("start", [TEACHER.flip(1), torch.zeros(2, 2)], ids=["turned", "zero"])
def test_gradients_are_finite_and_lead_down(loss, start):
    student = start.clone().requires_grad_()
    before = loss(student, TEACHER)
    before.backward()
    assert student.grad.isfinite().all()
    if start.any():
        assert student.grad.abs().sum() > 0
        assert loss(student.detach() - 1e-3 * student.grad, TEACHER) < before


def test_the_setting_offers_these_losses_and_no_other():
    assert set(get_args(get_type_hints(DistillDepthConfig)["loss"])) == set(LOSSES)
