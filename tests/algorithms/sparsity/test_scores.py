"""Scores against closed forms on matrices small enough to see through."""

import itertools

import pytest
import torch

from ppcl_engine.algorithms.sparsity import scores
from ppcl_engine.algorithms.sparsity.layer import (
    drop_costs,
    keep_gains,
    layer_error,
    relative_error,
)

from ...tiny.layers import layer

WEIGHT = torch.tensor([[3.0, -1.0], [0.5, 2.0]], dtype=torch.float64)
ENERGY = torch.tensor([4.0, 9.0], dtype=torch.float64)


def test_magnitude_and_wanda():
    assert scores.magnitude(WEIGHT).tolist() == [[3, 1], [0.5, 2]]
    assert scores.wanda(WEIGHT, ENERGY).tolist() == [[6, 3], [1, 6]]


def test_ria_weighs_a_weight_by_its_row_and_its_column():
    expected = (3 / 3.5 + 3 / 4) * 2**0.5
    assert float(scores.ria(WEIGHT, ENERGY)[0, 0]) == pytest.approx(expected)
    assert float(scores.ria(WEIGHT, ENERGY, power=0)[1, 1]) == pytest.approx(2 / 3 + 2 / 2.5)


def test_balanced_energy_at_one_half_ranks_as_wanda_does():
    weight, _, gram = layer(8, 16)
    ours = scores.balanced_energy(weight, gram.diagonal(), 0.5).flatten().argsort()
    assert torch.equal(ours, scores.wanda(weight, gram.diagonal()).flatten().argsort())


def test_balanced_energy_is_the_formula_and_has_no_scale():
    share = 0.75
    expected = (9 / (14.25 / 4)) ** 0.25 * (4 / 6.5) ** 0.75
    assert float(scores.balanced_energy(WEIGHT, ENERGY, share)[0, 0]) == pytest.approx(expected)
    scaled = scores.balanced_energy(7 * WEIGHT, 3 * ENERGY, share)
    torch.testing.assert_close(scaled, scores.balanced_energy(WEIGHT, ENERGY, share))


def test_the_layer_error_is_the_mean_squared_change_of_the_output():
    weight, inputs, gram = layer()
    removed = weight.masked_fill(weight.abs() > 0.5, 0)
    expected = float((inputs @ removed.T).square().sum(1).mean())
    assert layer_error(removed, gram) == pytest.approx(expected)
    assert relative_error(weight, weight, gram) == pytest.approx(1)
    assert relative_error(0 * weight, 0 * weight, gram) == 0


def test_prices_are_the_exact_change_of_the_error():
    weight, _, gram = layer()
    stays = weight.abs() > 0.5
    removed = weight.masked_fill(stays, 0)
    error, costs, gains = (
        layer_error(removed, gram),
        *(f(weight, gram, removed @ gram) for f in (drop_costs, keep_gains)),
    )
    for i, j in itertools.product(*map(range, weight.shape)):
        other = removed.clone()
        other[i, j] = weight[i, j] if stays[i, j] else 0
        change = layer_error(other, gram) - error
        assert change == pytest.approx(float(costs[i, j] if stays[i, j] else -gains[i, j]))


def test_surgeon_is_the_error_of_one_dropped_weight_when_the_row_makes_up_for_it():
    weight, _, gram = layer()
    score = scores.surgeon(weight, torch.linalg.inv(gram).diagonal())
    for j in range(weight.shape[1]):
        others = [k for k in range(weight.shape[1]) if k != j]
        best = torch.linalg.solve(gram[others][:, others], gram[others] @ weight.T).T
        change = weight.clone()
        change[:, others] -= best
        errors = ((change @ gram) * change).sum(1)
        torch.testing.assert_close(errors, score[:, j])
