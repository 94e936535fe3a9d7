"""Bootstrap and Wilson intervals: how often they hold, and published values."""

import pytest
import torch

from ppcl_engine.algorithms.resampling import (
    bootstrap_interval,
    bootstrap_ratio,
    bootstrap_subsets,
    drawn_tokens,
    wilson_interval,
)

from ..tiny.tensors import normal


def test_bootstrap_intervals_cover_about_as_often_as_they_say():
    covered = shorter = 0
    for trial in range(150):
        values = normal(40, seed=trial)
        low, high = bootstrap_interval(values, seed=trial, resamples=300)
        covered += low <= 0 <= high
        low_half, high_half = bootstrap_interval(values, seed=trial, resamples=300, level=0.5)
        shorter += low < low_half < high_half < high
    assert 0.88 <= covered / 150 <= 0.99
    assert shorter == 150


def test_a_ratio_is_resampled_together():
    below = normal(50).square() + 0.1
    assert bootstrap_ratio(3 * below, below, seed=0) == pytest.approx((3, 3))
    low, high = bootstrap_ratio(normal(50, seed=1).square(), below, seed=0)
    assert low < float(normal(50, seed=1).square().sum() / below.sum()) < high


def test_bootstrap_subsets_take_whole_samples_once():
    subsets = bootstrap_subsets(samples=10, rows_per_sample=3, resamples=50, seed=0)
    assert subsets.shape == (30, 51) and subsets[:, 0].all()
    assert set(subsets.flatten().tolist()) == {0.0, 1.0}
    by_sample = subsets.reshape(10, 3, 51)
    assert torch.equal(by_sample.amin(1), by_sample.amax(1))
    assert 0.55 < float(by_sample[:, 0, 1:].mean()) < 0.75  # a draw hits 1 - (1 - 1/10)^10 = 65 %
    assert torch.equal(subsets, bootstrap_subsets(10, 3, 50, seed=0))


@pytest.mark.parametrize(
    ("right", "count", "expected"),
    [(1000, 1000, (0.99617, 1.0)), (0, 50, (0.0, 0.07135)), (81, 263, (0.2553, 0.3662))],
)
def test_wilson_interval_against_published_values(right, count, expected):
    """81 of 263: Newcombe 1998, table I, method 3."""
    values = torch.arange(count) < right
    assert wilson_interval(values) == pytest.approx(expected, abs=1e-4)


def test_tokens_are_drawn_from_the_real_ones_alone():
    real = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    for count, found in ((2, 2), (9, 3)):
        drawn = drawn_tokens(real, count, torch.Generator().manual_seed(0))
        assert drawn.shape == (2, found) and bool(real.gather(1, drawn).all())
        assert all(len(set(row)) == found for row in drawn.tolist())
    assert torch.equal(drawn, drawn_tokens(real, 9, torch.Generator().manual_seed(0)))
