"""A layer by every method: exact shares, zeros where they belong, and the error that is said."""

import itertools

import pytest
import torch

from ppcl_engine.algorithms.sparsity.clusters import KnownGroups
from ppcl_engine.algorithms.sparsity.layer import layer_error
from ppcl_engine.algorithms.sparsity.patterns import pattern_named
from ppcl_engine.algorithms.sparsity.pruning import (
    GRANULARITIES,
    SCORES,
    Method,
    plain_score,
    prune_layer,
)

from ...tiny.layers import layer

DENSE = pattern_named("unstructured")
KNOWN = KnownGroups(rows=(8, 8), columns=(16, 16))


def pruned(score="energy", granularity="cluster", sparsity=0.5, pattern=DENSE, seed=0, **more):
    weight, _, gram = layer(16, 32, seed)
    method = Method(
        pattern=pattern, sparsity=sparsity, score=score, granularity=granularity, **more
    )
    return weight, gram, prune_layer(weight, gram, method, KNOWN)


@pytest.mark.parametrize(("score", "granularity"), list(itertools.product(SCORES, GRANULARITIES)))
def test_every_score_in_every_granularity(score, granularity):
    weight, gram, found = pruned(score, granularity, sparsity=0.61)
    assert int((~found.stays).sum()) == round(16 * 32 * 0.61)
    assert (found.weight[~found.stays] == 0).all() and (
        found.weight != 0
    ).sum() == found.stays.sum()
    assert found.error == pytest.approx(
        layer_error(weight - found.weight, gram) / layer_error(weight, gram)
    )
    if score != "obs":
        assert torch.equal(found.weight, weight * found.stays)


@pytest.mark.parametrize(("score", "name"), list(itertools.product(SCORES, ("2:4", "4:8"))))
def test_every_score_in_groups(score, name):
    pattern = pattern_named(name)
    _, _, found = pruned(score, pattern=pattern)
    assert ((found.weight != 0).reshape(-1, pattern.of).sum(1) == pattern.keep).all()


@pytest.mark.parametrize("seed", range(3))
def test_ours_is_never_worse_than_wanda_in_the_same_granularity(seed):
    """g = 1/2 ranks as Wanda does and is one of the candidates."""
    for granularity in GRANULARITIES:
        ours, theirs = (pruned(score, granularity, seed=seed)[2] for score in ("energy", "wanda"))
        assert ours.error <= theirs.error * (1 + 1e-12)
        assert ours.share in (0.5, 0.6, 2 / 3, 0.75)


def test_compensation_helps_every_score():
    for score in ("magnitude", "wanda", "ria", "energy"):
        assert pruned(score, compensate=True)[2].error < pruned(score)[2].error


def test_exchanges_help_every_score_and_compensation_still_helps_then():
    for score in ("magnitude", "wanda", "ria", "energy"):
        plain, exchanged = (pruned(score, exchange=exchange)[2] for exchange in (False, True))
        assert exchanged.error < plain.error and exchanged.stays.sum() == plain.stays.sum()
        assert pruned(score, exchange=True, compensate=True)[2].error < exchanged.error


def test_the_surgeon_of_one_layer_beats_what_does_not_compensate():
    assert pruned("obs", "layer")[2].error < pruned("energy", "layer")[2].error


def test_unknown_scores_list_the_known():
    weight, _, gram = layer()
    with pytest.raises(
        ValueError, match="score 'taylor' is unknown; known: magnitude, wanda, ria, obs, energy"
    ):
        plain_score(weight, gram, "taylor")
