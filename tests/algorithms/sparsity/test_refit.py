"""The refit against least squares, row by row."""

import pytest
import torch

from ppcl_engine.algorithms.sparsity import compensation
from ppcl_engine.algorithms.sparsity.compensation import refitted
from ppcl_engine.algorithms.sparsity.layer import layer_error

from .test_compensation import least_squares
from .test_scores import layer


def test_it_is_the_least_squares_solution():
    weight, _, gram = layer(9, 20)
    stays = weight.abs() > weight.abs().median()
    new = refitted(weight, gram, stays, damping=0)
    assert (new[~stays] == 0).all()
    best, ours = (layer_error(weight - w, gram) for w in (least_squares(weight, gram, stays), new))
    assert best <= ours < best * 1.01


def test_it_beats_the_surgeon_on_the_same_mask():
    weight, _, gram = layer(16, 40)
    stays = weight.abs() > weight.abs().median()
    surgeon, _ = compensation.compensated(
        weight, gram, lambda first, part: stays[:, first : first + part.shape[1]]
    )
    assert layer_error(weight - refitted(weight, gram, stays), gram) < layer_error(
        weight - surgeon, gram
    )


def test_a_ridge_keeps_weights_where_the_inputs_say_nothing():
    weight, _, gram = layer(4, 8)
    gram[:, 4:], gram[4:] = 0, 0
    stays = torch.ones_like(weight, dtype=torch.bool)
    stays[:, 0] = False
    new = refitted(weight, gram, stays)
    torch.testing.assert_close(new[:, 4:], weight[:, 4:])
    assert not torch.equal(new[:, 1:4], weight[:, 1:4])


def test_nothing_to_do_and_nothing_left():
    weight, _, gram = layer(4, 8)
    assert torch.equal(refitted(weight, gram, torch.ones_like(weight, dtype=torch.bool)), weight)
    assert not refitted(weight, gram, torch.zeros_like(weight, dtype=torch.bool)).any()


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_one_large_input_changes_nothing_for_the_others(size):
    weight, _, gram = layer(6, 24)
    stays = weight.abs() > weight.abs().median()
    scale = torch.ones(24, dtype=torch.float64)
    scale[5] = size
    scaled = refitted(weight / scale, gram * scale.outer(scale), stays)
    torch.testing.assert_close(scaled * scale, refitted(weight, gram, stays))
