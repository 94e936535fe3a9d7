"""Prunes one layer by a method: which weights stay, their new values, and the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import compensation, granularity, scores
from .clusters import KnownGroups, cluster_rows_and_columns
from .compensation import refitted
from .exchange import exchanged
from .granularity import Tiles
from .layer import layer_error, relative_error
from .patterns import Pattern, kept_of_groups

SCORES = ("magnitude", "wanda", "ria", "obs", "energy")
GRANULARITIES = ("row", "layer", "cluster")
RECONSTRUCTION = "a reconstruction of arXiv 2607.00927, of which the abstract alone is public"


@dataclass(frozen=True, kw_only=True)
class Method:
    """How layers are pruned."""

    pattern: Pattern
    """which weights may be zero"""
    sparsity: float
    """share of the weights that are dropped"""
    score: str = "energy"
    """one of SCORES"""
    granularity: str = "cluster"
    """one of GRANULARITIES, for unstructured patterns"""
    exchange: bool = False
    """weights of a row are exchanged as long as the exact error falls"""
    compensate: bool = False
    """the remaining weights compensate for the dropped ones (obs always does)"""

    @property
    def settles_as_it_goes(self) -> bool:
        """SparseGPT as published; with clusters or exchanges its score only ranks once, and a refit
        follows."""
        clusters = self.granularity == "cluster" and not self.pattern.is_structured
        return self.score == "obs" and not self.exchange and not clusters


@dataclass(frozen=True)
class PrunedLayer:
    """A layer's weights after pruning."""

    weight: torch.Tensor
    """[rows, columns], with exact zeros"""
    stays: torch.Tensor
    """mask [rows, columns]"""
    error: float
    """of the layer's output on its calibration inputs, relative and squared"""
    share: float | None = None
    """g of the energy score"""


def prune_layer(
    weight: torch.Tensor, gram: torch.Tensor, method: Method, groups: KnownGroups
) -> PrunedLayer:
    """weight [rows, columns] and gram [columns, columns] in float64. The returned weight has exact
    zeros."""
    if method.settles_as_it_goes:
        share, (new, stays) = None, _surgeon_as_it_goes(weight, gram, method)
    else:
        share, stays = _best_mask(weight, gram, method, groups)
        compensate = method.compensate or method.score == "obs"
        new = refitted(weight, gram, stays) if compensate else weight.masked_fill(~stays, 0)
    return PrunedLayer(new, stays, relative_error(weight - new, weight, gram), share)


def _best_mask(
    weight, gram, method: Method, groups: KnownGroups
) -> tuple[float | None, torch.Tensor]:
    """(g, which weights stay); for the energy score, the g with the lowest exact error.

    Where budgets move between tiles, that is tried for the best of those with even budgets and for
    g = 1/2, so that ours is never worse than Wanda's ranking.
    """
    tiles = _tiles(weight, gram, method, groups)
    if method.score != "energy":
        share, stays = (
            None,
            _mask(weight, gram, method, tiles, plain_score(weight, gram, method.score)),
        )
    else:
        share, stays = _of_shares(
            weight, gram, replace(method, granularity="even"), tiles, scores.SHARES
        )
        if tiles is not None and method.granularity == "cluster":
            share, stays = _of_shares(
                weight, gram, method, tiles, dict.fromkeys((scores.SHARES[0], share))
            )
    return share, exchanged(weight, gram, stays, method.pattern) if method.exchange else stays


def _of_shares(
    weight, gram, method: Method, tiles: Tiles | None, shares
) -> tuple[float, torch.Tensor]:
    """The share g with the lowest error, and its mask."""
    energy = gram.diagonal()
    masks = {
        g: _mask(weight, gram, method, tiles, scores.balanced_energy(weight, energy, g))
        for g in shares
    }
    best = min(masks, key=lambda g: layer_error(weight.masked_fill(masks[g], 0), gram))
    return best, masks[best]


def plain_score(weight: torch.Tensor, gram: torch.Tensor, name: str) -> torch.Tensor:
    """A score without a setting; for the energy score, with g = 1/2."""
    energy = gram.diagonal()
    match name:
        case "magnitude":
            return scores.magnitude(weight)
        case "wanda":
            return scores.wanda(weight, energy)
        case "ria":
            return scores.ria(weight, energy)
        case "obs":
            return scores.surgeon(weight, compensation.inverse_diagonal(gram))
        case "energy":
            return scores.balanced_energy(weight, energy, scores.SHARES[0])
    raise ValueError(f"score {name!r} is unknown; known: {', '.join(SCORES)}")


def _tiles(weight, gram, method: Method, groups: KnownGroups) -> Tiles | None:
    if method.pattern.is_structured:
        return None
    if method.granularity == "cluster":
        return granularity.cluster_tiles(*cluster_rows_and_columns(weight, gram.diagonal(), groups))
    return (
        granularity.row_tiles(weight)
        if method.granularity == "row"
        else granularity.one_tile(weight)
    )


def _mask(weight, gram, method: Method, tiles: Tiles | None, score: torch.Tensor) -> torch.Tensor:
    if tiles is None:
        return kept_of_groups(score, method.pattern)
    rank, counts = granularity.ranks(score, tiles), granularity.even_counts(tiles, method.sparsity)
    if method.granularity == "cluster":
        counts = granularity.moved_counts(weight, gram, rank, tiles, counts)
    return granularity.kept(rank, tiles, counts)


def _surgeon_as_it_goes(weight, gram, method: Method) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT: each run of columns is decided when its turn comes, on weights that earlier runs
    have changed.

    Its shares are rounded so that they add up to the layer's.
    """
    if method.pattern.is_structured:
        choose = lambda first, part: kept_of_groups(part, method.pattern)  # noqa: E731
        return compensation.compensated(weight, gram, choose, step=method.pattern.of)
    return compensation.compensated(weight, gram, _choose_within(len(weight), method))


def _choose_within(rows: int, method: Method) -> Callable[[int, torch.Tensor], torch.Tensor]:
    tiles_of = granularity.row_tiles if method.granularity == "row" else granularity.one_tile

    def choose(first: int, part: torch.Tensor) -> torch.Tensor:
        tiles = tiles_of(part)
        before, after = (
            round(rows * columns * method.sparsity) for columns in (first, first + part.shape[1])
        )
        counts = granularity.even_counts(tiles, (after - before) / part.numel())
        return granularity.kept(granularity.ranks(part, tiles), tiles, counts)

    return choose
