"""Rectified flow against velocity fields that can be integrated by hand."""

import math

import pytest
import torch

from ppcl_engine.data.flow import euler, euler_timesteps, guided, noised, rescaled


def test_noised_runs_from_clean_to_noise():
    clean, noise = torch.full((3, 2, 4), 2.0), torch.full((3, 2, 4), 10.0)
    states = noised(clean, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert [float(row.mean()) for row in states] == [2.0, 4.0, 10.0]


def test_timesteps_fall_in_equal_steps_with_both_ends():
    assert euler_timesteps(4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_straight_flow_is_exact_in_one_step_or_many():
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for steps in (1, 7):
        torch.testing.assert_close(
            euler(lambda x, t: noise - clean, noise, euler_timesteps(steps)), clean
        )


def test_euler_on_dx_dt_equals_x():
    """Each step multiplies by 1 - 1/steps; the limit is e^-1."""
    x = torch.ones(1, dtype=torch.float64)
    assert float(euler(lambda x, t: x, x, euler_timesteps(10))) == pytest.approx(0.9**10)
    errors = [
        abs(float(euler(lambda x, t: x, x, euler_timesteps(steps))) - 1 / math.e)
        for steps in (100, 200)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)  # first order


def test_velocity_and_seen_get_the_state_and_time_before_the_step():
    asked, shown = [], []

    def velocity(x, t):
        asked.append((float(x), t))
        return torch.ones(1)

    timesteps = [1.0, 0.75, 0.25, 0.0]  # unequal steps, as samplers with a shifted schedule take
    end = euler(
        velocity, torch.ones(1), timesteps, lambda step, x, t: shown.append((step, float(x), t))
    )
    assert asked == [(1.0, 1.0), (0.75, 0.75), (0.25, 0.25)]
    assert shown == [(step, *state) for step, state in enumerate(asked)]
    assert float(end) == 0


def test_guidance():
    empty, caption = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(guided(empty, caption, 1.0), caption)
    assert torch.equal(guided(empty, caption, 0.0), empty)
    assert torch.equal(guided(caption, caption, 9.0), caption)
    torch.testing.assert_close(guided(empty, caption, 3.0), 3 * caption - 2 * empty)


def test_rescaling_keeps_the_direction_and_takes_the_captions_norm_of_each_token():
    guided_velocity, caption = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    result = rescaled(guided_velocity, caption)
    torch.testing.assert_close(result.norm(dim=-1), caption.norm(dim=-1))
    torch.testing.assert_close(
        torch.cosine_similarity(result, guided_velocity, dim=-1), torch.ones(2, 3)
    )
