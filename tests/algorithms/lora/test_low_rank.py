"""The mathematics of low-rank changes, against matrices that are made whole."""

import pytest
import torch

from ppcl_engine.algorithms.lora.low_rank import GatedEquations, energy, nearest, truncated
from ppcl_engine.models.lora_kinds import LowRank

INPUTS, OUTPUTS, RANK = 7, 9, 2


@pytest.fixture
def pairs():
    torch.manual_seed(0)
    return [LowRank(torch.randn(2, INPUTS), torch.randn(OUTPUTS, 2), s) for s in (0.5, 2.0)]


def test_truncated_is_the_best_of_its_rank(pairs):
    whole = sum(pair.matrix() for pair in pairs)
    left, values, right = torch.linalg.svd(whole)
    best = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    found = truncated(pairs, RANK)
    torch.testing.assert_close(found.matrix(), best)
    torch.testing.assert_close(nearest(whole, RANK).matrix(), best)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1))
    torch.testing.assert_close(truncated(pairs, 4).matrix(), whole)


def test_energy_is_that_of_the_singular_values(pairs):
    values = torch.linalg.svdvals(sum(pair.matrix() for pair in pairs))
    assert energy(pairs) == pytest.approx(float(values.square().sum()), rel=1e-5)
    assert energy([]) == 0


@pytest.mark.parametrize("differ", ["samples", "channels"])
def test_a_change_behind_a_gate_is_found_again(differ):
    """Where gates differ between samples only, or between channels only, the sums are exact."""
    torch.manual_seed(1)
    change = torch.randn(OUTPUTS, RANK) @ torch.randn(RANK, INPUTS)
    equations = GatedEquations(INPUTS, OUTPUTS)
    for _ in range(6):
        gate = (
            torch.randn(1).expand(OUTPUTS) if differ == "samples" else torch.arange(OUTPUTS) - 3.0
        )
        h = torch.randn(20, INPUTS)
        equations.add(h, gate, gate * (h @ change.T))
    found = equations.solve(RANK).matrix()
    open_rows = torch.ones(OUTPUTS, dtype=torch.bool)
    if differ == "channels":
        open_rows[3] = False  # nothing passes its gate, so nothing is asked of it
        assert not found[3].any()
    torch.testing.assert_close(found[open_rows], change[open_rows], rtol=2e-3, atol=2e-3)


def test_the_rank_is_spent_where_the_stream_sees_it():
    """Reduced-rank regression in the gated metric: no pair of that rank leaves a smaller error."""
    torch.manual_seed(2)
    gate, h = torch.tensor([10.0, 1.0, 0.1, 1.0]), torch.randn(400, 5)
    y = torch.randn(400, 4) * gate
    equations = GatedEquations(5, 4)
    equations.add(h, gate, y)

    def error(change: torch.Tensor) -> float:
        return float((gate * (h @ change.T) - y).square().sum())

    found = equations.solve(1)
    least = error(found.matrix())
    for _ in range(50):
        near = LowRank(
            found.down + 0.02 * torch.randn(1, 5), found.up + 0.02 * torch.randn(4, 1), 1.0
        )
        assert error(near.matrix()) >= least * (1 - 1e-6)
