"""Exchanges against brute force: at the end none is left that helps, and every row keeps its
count."""

import itertools

import pytest
import torch

from ppcl_engine.algorithms.sparsity.exchange import exchanged
from ppcl_engine.algorithms.sparsity.layer import layer_error
from ppcl_engine.algorithms.sparsity.patterns import kept_of_groups, pattern_named
from ppcl_engine.algorithms.sparsity.scores import wanda

from ...tiny.layers import layer


def lowest_by_row(weight, gram):
    score = wanda(weight, gram.diagonal())
    return score > score.median(1, keepdim=True).values


def row_error(weight, gram, stays):
    removed = weight.masked_fill(stays, 0)
    return float(removed @ gram @ removed)


@pytest.mark.parametrize("name", ["unstructured", "2:4", "4:8"])
def test_no_exchange_is_left_that_helps(name):
    weight, _, gram = layer(6, 16)
    pattern = pattern_named(name)
    start = (
        kept_of_groups(wanda(weight, gram.diagonal()), pattern)
        if pattern.of
        else lowest_by_row(weight, gram)
    )
    stays = exchanged(weight, gram, start, pattern)
    assert torch.equal(stays.sum(1), start.sum(1))
    if pattern.of:
        assert (stays.reshape(-1, pattern.of).sum(1) == pattern.keep).all()
    before, after = (layer_error(weight.masked_fill(s, 0), gram) for s in (start, stays))
    assert after < before
    for row, mask in enumerate(stays):
        best, of = row_error(weight[row], gram, mask), pattern.of or 16
        after = {}
        for a, b in itertools.product(range(16), range(16)):
            if mask[a] and not mask[b] and a // of == b // of:
                other = mask.clone()
                other[a], other[b] = False, True
                after[a, b] = row_error(weight[row], gram, other)
        # pairs of two that are nothing by themselves are not looked for
        assert min(after.values()) > 0.9 * best


def test_a_mask_that_is_the_best_stays():
    weight, gram = torch.tensor([[1.0, 2, 3, 4]]).double(), torch.eye(4).double()
    stays = torch.tensor([[False, False, True, True]])
    assert torch.equal(exchanged(weight, gram, stays, pattern_named("unstructured")), stays)
    worst = exchanged(weight, gram, ~stays, pattern_named("unstructured"))
    assert torch.equal(worst, stays)


def test_weights_whose_errors_cancel_go_together():
    """x_0 = -x_1: dropping both of two equal weights costs nothing, whatever their size; half of it
    costs most."""
    gram = torch.tensor([[1.0, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).double()
    weight = torch.tensor([[5.0, 5, 6, 1]]).double()
    stays = exchanged(
        weight, gram, torch.tensor([[True, False, True, False]]), pattern_named("unstructured")
    )
    assert stays.tolist() == [[False, False, True, True]]
