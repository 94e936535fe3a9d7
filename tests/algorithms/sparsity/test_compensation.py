"""Optimal brain surgeon and the refit against least squares, row by row, and the surgeon against
itself in blocks of any size."""

import pytest
import torch

from ppcl_engine.algorithms.sparsity import compensation
from ppcl_engine.algorithms.sparsity.compensation import refitted
from ppcl_engine.algorithms.sparsity.layer import layer_error

from ...tiny.layers import layer


def least_squares(weight, gram, kept):
    """The best weights of each row on the columns that stay."""
    best = torch.zeros_like(weight)
    for row, stays in enumerate(kept):
        some = stays.nonzero()[:, 0]
        best[row, some] = torch.linalg.solve(gram[some][:, some], gram[some] @ weight[row])
    return best


def test_first_columns_that_go_leave_the_least_squares_solution():
    weight, _, gram = layer(5, 12)
    kept = torch.ones(5, 12, dtype=torch.bool)
    kept[:, :4] = False
    new, stays = compensation.compensated(
        weight, gram, lambda first, part: kept[:, first : first + part.shape[1]], damping=0
    )
    assert torch.equal(stays, kept)
    torch.testing.assert_close(new, least_squares(weight, gram, kept))


def test_any_mask_loses_less_than_without_and_not_less_than_least_squares():
    weight, _, gram = layer(9, 40)
    kept = weight.abs() > weight.abs().median()
    new, _ = compensation.compensated(
        weight, gram, lambda first, part: kept[:, first : first + part.shape[1]], damping=0
    )
    plain, ours, best = (
        layer_error(weight - w, gram)
        for w in (weight.masked_fill(~kept, 0), new, least_squares(weight, gram, kept))
    )
    assert best <= ours < 0.7 * plain
    assert (new[~kept] == 0).all()


def test_blocks_change_nothing_but_the_order_of_sums(monkeypatch):
    weight, _, gram = layer(6, 40)
    kept = weight.abs() > weight.abs().median()
    found = []
    for size in (40, 8):
        monkeypatch.setattr(compensation, "BLOCK", size)
        found.append(
            compensation.compensated(
                weight, gram, lambda first, part: kept[:, first : first + part.shape[1]]
            )[0]
        )
    torch.testing.assert_close(*found)


def test_the_factor_knows_the_inverse():
    _, _, gram = layer(2, 6)
    factor = compensation.inverse_factor(gram, damping=0)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(gram))
    torch.testing.assert_close(
        compensation.inverse_diagonal(gram, damping=0), torch.linalg.inv(gram).diagonal()
    )
    # of what is left when two columns are settled
    settled = torch.linalg.inv(gram[2:, 2:]).diagonal()
    assert float(factor[2, 2].square()) == pytest.approx(float(settled[0]))


def test_inputs_that_never_vary_are_no_obstacle():
    weight, _, gram = layer(3, 8)
    gram[2], gram[:, 2] = 0, 0
    new, _ = compensation.compensated(weight, gram, lambda first, part: part > part.median())
    assert torch.isfinite(new).all()


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_one_large_input_changes_nothing_for_the_others(size):
    """A column of inputs `size` times as large, its weights that much smaller: the same layer, so
    the same choice and the same weights."""
    weight, _, gram = layer(6, 24)
    scale = torch.ones(24, dtype=torch.float64)
    scale[5] = size

    def choose(first, part):
        return part >= part.median(1, keepdim=True).values

    new, stays = compensation.compensated(weight, gram, choose)
    scaled, stays_too = compensation.compensated(weight / scale, gram * scale.outer(scale), choose)
    assert torch.equal(stays, stays_too)
    torch.testing.assert_close(scaled * scale, new)


def test_a_refit_is_the_least_squares_solution():
    weight, _, gram = layer(9, 20)
    stays = weight.abs() > weight.abs().median()
    new = refitted(weight, gram, stays, damping=0)
    assert (new[~stays] == 0).all()
    best, ours = (layer_error(weight - w, gram) for w in (least_squares(weight, gram, stays), new))
    assert best <= ours < best * 1.01


def test_a_refit_beats_the_surgeon_on_the_same_mask():
    weight, _, gram = layer(16, 40)
    stays = weight.abs() > weight.abs().median()
    surgeon, _ = compensation.compensated(
        weight, gram, lambda first, part: stays[:, first : first + part.shape[1]]
    )
    assert layer_error(weight - refitted(weight, gram, stays), gram) < layer_error(
        weight - surgeon, gram
    )


def test_a_refits_ridge_keeps_weights_where_the_inputs_say_nothing():
    weight, _, gram = layer(4, 8)
    gram[:, 4:], gram[4:] = 0, 0
    stays = torch.ones_like(weight, dtype=torch.bool)
    stays[:, 0] = False
    new = refitted(weight, gram, stays)
    torch.testing.assert_close(new[:, 4:], weight[:, 4:])
    assert not torch.equal(new[:, 1:4], weight[:, 1:4])


def test_a_refit_with_nothing_to_do_and_with_nothing_left():
    weight, _, gram = layer(4, 8)
    assert torch.equal(refitted(weight, gram, torch.ones_like(weight, dtype=torch.bool)), weight)
    assert not refitted(weight, gram, torch.zeros_like(weight, dtype=torch.bool)).any()


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_one_large_input_of_a_refit_changes_nothing_for_the_others(size):
    weight, _, gram = layer(6, 24)
    stays = weight.abs() > weight.abs().median()
    scale = torch.ones(24, dtype=torch.float64)
    scale[5] = size
    scaled = refitted(weight / scale, gram * scale.outer(scale), stays)
    torch.testing.assert_close(scaled * scale, refitted(weight, gram, stays))
