"""Patterns and granularities: the share is exact, who is compared with whom, and what a budget that
moves gains."""

import pytest
import torch

from ppcl_engine.algorithms.sparsity import granularity
from ppcl_engine.algorithms.sparsity.clusters import (
    KnownGroups,
    cluster_rows_and_columns,
    features,
    k_means,
    start_labels,
)
from ppcl_engine.algorithms.sparsity.layer import layer_error
from ppcl_engine.algorithms.sparsity.patterns import checked_sparsity, kept_of_groups, pattern_named
from ppcl_engine.algorithms.sparsity.scores import wanda

from ...tiny.layers import layer


@pytest.mark.parametrize("name", ["2:4", "4:8"])
def test_every_group_keeps_its_highest(name):
    pattern = pattern_named(name)
    score = torch.rand(5, 16, generator=torch.Generator().manual_seed(0))
    kept = kept_of_groups(score, pattern)
    for row, stays in zip(score.reshape(-1, pattern.of), kept.reshape(-1, pattern.of), strict=True):
        assert int(stays.sum()) == pattern.keep
        assert row[stays].min() >= row[~stays].max()


def test_equal_scores_still_keep_the_pattern():
    assert kept_of_groups(torch.zeros(3, 8), pattern_named("2:4")).sum() == 12


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 7.0])
def test_a_sparsity_that_is_no_share(sparsity):
    with pytest.raises(ValueError, match="between 0 and 1"):
        checked_sparsity(sparsity, pattern_named("unstructured"))


def test_patterns_bring_their_own_share_and_refuse_what_does_not_divide():
    assert checked_sparsity(None, pattern_named("4:8")) == 0.5
    with pytest.raises(ValueError, match="2:4 drops 0.5"):
        checked_sparsity(0.6, pattern_named("2:4"))
    with pytest.raises(ValueError, match="to_q has 30 inputs, which is not a multiple of 4"):
        pattern_named("2:4").check_columns(30, "block 0, to_q")
    with pytest.raises(ValueError, match="'3:7' is unknown; known: unstructured, 2:4, 4:8"):
        pattern_named("3:7")


def tiles_of(weight, gram):
    labels = cluster_rows_and_columns(weight, gram.diagonal(), KnownGroups(rows=(4, 3)))
    return {
        "row": granularity.row_tiles(weight),
        "layer": granularity.one_tile(weight),
        "cluster": granularity.cluster_tiles(*labels),
    }


@pytest.mark.parametrize("name", ["row", "layer", "cluster"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6, 0.7, 0.013])
def test_the_total_is_exact(name, sparsity):
    weight, _, gram = layer(7, 22)
    tiles = tiles_of(weight, gram)[name]
    counts = granularity.even_counts(tiles, sparsity)
    kept = granularity.kept(granularity.ranks(weight.abs(), tiles), tiles, counts)
    assert int((~kept).sum()) == round(7 * 22 * sparsity)
    assert (counts - sparsity * tiles.sizes).abs().max() < 1


def test_a_row_drops_its_own_lowest_and_a_layer_the_lowest_of_all():
    weight, _, gram = layer(7, 10)
    tiles = tiles_of(weight, gram)
    by_row, by_layer = (
        granularity.kept(granularity.ranks(weight.abs(), t), t, granularity.even_counts(t, 0.5))
        for t in (tiles["row"], tiles["layer"])
    )
    assert (by_row.sum(1) == 5).all() and by_layer.sum() == 35
    assert weight[by_layer].abs().min() >= weight[~by_layer].abs().max()


def test_ranks_of_equal_scores_are_a_permutation_of_every_tile():
    tiles = granularity.cluster_tiles(torch.tensor([0, 1, 0]), torch.tensor([1, 0, 0, 1]))
    rank = granularity.ranks(torch.zeros(3, 4), tiles)
    for tile, size in enumerate(tiles.sizes.tolist()):
        assert sorted(rank[tiles.of == tile].tolist()) == list(range(size))


def test_a_budget_that_moves_keeps_its_sum_and_lowers_the_exact_error():
    weight, _, gram = layer(24, 32)
    weight[:8] *= 10  # these rows can spare nothing
    tiles = granularity.cluster_tiles(torch.arange(24) // 8, torch.arange(32) // 16)
    rank, even = (
        granularity.ranks(wanda(weight, gram.diagonal()), tiles),
        granularity.even_counts(tiles, 0.5),
    )
    moved = granularity.moved_counts(weight, gram, rank, tiles, even)
    assert int(moved.sum()) == int(even.sum())
    assert (moved >= 0).all() and (moved <= tiles.sizes).all()
    assert moved[:2].sum() < even[:2].sum() / 2
    before, after = (
        layer_error(weight.masked_fill(granularity.kept(rank, tiles, counts), 0), gram)
        for counts in (even, moved)
    )
    assert after < 0.5 * before


def test_k_means_finds_groups_that_are_apart_from_a_start_that_is_nearly_right():
    generator, truth = torch.Generator().manual_seed(0), torch.arange(40) // 10
    truth[[3, 17, 38]] = torch.tensor([2, 0, 1])
    points = torch.tensor([[0.0, 0], [9, 0], [0, 9], [9, 9]])[truth] + 0.1 * torch.randn(
        40, 2, generator=generator
    )
    assert torch.equal(k_means(points, start_labels(points, known=(10, 10, 10, 10))), truth)


def test_a_cluster_that_loses_its_points_is_gone():
    points = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    assert k_means(points, torch.tensor([0, 4, 4, 4])).tolist() == [0, 0, 1, 1]
    assert k_means(torch.zeros(4, 1), torch.tensor([0, 1, 2, 2])).tolist() == [0, 0, 0, 0]


def test_features_and_starts():
    found = features(torch.tensor([[1.0, -1, 1, -1], [0, 0, 0, 2], [3, 3, 3, 3]]))
    assert found[:, 1].argmax() == 1 and found[:, 2].argmax() == 1
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    assert start_labels(torch.zeros(12, 3), (1,) * 12).tolist() == [
        0,
        0,
        1,
        2,
        2,
        3,
        4,
        4,
        5,
        6,
        6,
        7,
    ]
    assert start_labels(torch.tensor([[3.0], [1], [2], [0]]), ()).tolist() == [3, 1, 2, 0]
