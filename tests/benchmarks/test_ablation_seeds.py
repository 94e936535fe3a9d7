"""Rows over several seeds: a bootstrap over seeds and captions, and a verdict only where it is clear."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ablation import seeds
from benchmarks.ablation.seeds import combined, resampled_drops


def readings(right: float, generator: torch.Generator, captions: int = 40):
    """A row that reads this share right, and a teacher that reads everything."""
    ours = (torch.rand(3, captions, generator=generator) < right).double()
    return ours, torch.ones(3, captions, dtype=torch.float64)


@pytest.fixture
def trials():
    generator = torch.Generator().manual_seed(0)
    return [readings(share, generator) for share in (0.9, 0.8, 0.7)]


def test_drops_are_those_of_drawn_seeds_and_captions(trials, monkeypatch):
    monkeypatch.setattr(seeds, "RESAMPLES", 5)
    drops = resampled_drops(trials)
    means = [100 * (1 - ours.mean()) for ours, _ in trials]
    assert float(drops[0]) == pytest.approx(float(sum(means) / 3))
    generator, expected = torch.Generator().manual_seed(seeds.SEED), torch.zeros(5)
    for _ in range(3):
        chosen = torch.randint(3, (5,), generator=generator)
        for number, (ours, _) in enumerate(trials):
            choice = torch.randint(40, (5, 40), generator=generator)
            for resample in range(5):
                if chosen[resample] == number:
                    expected[resample] += 100 * (1 - ours[:, choice[resample]].mean()) / 3
    torch.testing.assert_close(drops[1:].float(), expected)


def test_an_interval_over_seeds_is_wider_than_over_captions(trials):
    over_seeds, alone = resampled_drops(trials), resampled_drops(trials[1:2])
    assert over_seeds[1:].std() > 1.2 * alone[1:].std() > 0


@pytest.mark.parametrize(
    "shift, verdict", [(0.0, "not told apart"), (40.0, "worse"), (-40.0, "better")]
)
def test_better_and_worse_need_an_interval_without_0(trials, shift, verdict):
    drops = resampled_drops(trials)
    noisy = drops + shift + torch.linspace(-5, 5, len(drops))
    score = {"parameters": 10, "drop_percent": 1.0, "velocity_error": {"value": 0.5}}
    rows = [{"name": "a", "passes": 7, **score, "seconds": second} for second in (1.0, 2.0, 3.0)]
    row = combined(rows, noisy, drops)
    assert row["difference"]["verdict"] == verdict and row["seeds"] == [1.0, 1.0, 1.0]
    assert (row["seconds"], row["passes"]) == (2.0, 7)
    assert combined(rows, drops, None)["difference"] is None
