"""Which weights are ranked together: those of a row, of the layer, or of a tile (a cluster of rows
by a cluster of columns).

A granularity is a tile number for every weight and, for every tile, how many of its weights are
dropped; the counts add up to the layer's share exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layer import drop_costs, keep_gains

# share of a tile that moves at once: halved whenever a move does not help
FIRST_SHARE, LAST_SHARE = 0.1, 0.01
MOST_MOVES = 32


@dataclass(frozen=True)
class Tiles:
    """Groups of weights that are ranked together."""

    of: torch.Tensor
    """tile number of every weight, int64 [rows, columns] (or broadcastable to it)"""
    sizes: torch.Tensor
    """[tiles]"""


def one_tile(weight: torch.Tensor) -> Tiles:
    """The whole layer."""
    return Tiles(
        torch.zeros(1, 1, dtype=torch.int64, device=weight.device), _sizes([weight.numel()], weight)
    )


def row_tiles(weight: torch.Tensor) -> Tiles:
    """Every row by itself, as in Wanda."""
    rows, columns = weight.shape
    return Tiles(
        torch.arange(rows, device=weight.device)[:, None], _sizes([columns] * rows, weight)
    )


def cluster_tiles(row_labels: torch.Tensor, column_labels: torch.Tensor) -> Tiles:
    """Clusters of rows [rows] by clusters of columns [columns]."""
    across = int(column_labels.max()) + 1
    of = row_labels[:, None] * across + column_labels[None]
    return Tiles(of, torch.bincount(of.flatten(), minlength=(int(row_labels.max()) + 1) * across))


def _sizes(sizes: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sizes, dtype=torch.int64, device=like.device)


def even_counts(tiles: Tiles, sparsity: float) -> torch.Tensor:
    """The same share of every tile [tiles].

    What rounding leaves over goes to the tiles with the largest fractions, the first among equal
    ones, so that the sum is round(sparsity * all).
    """
    wanted = tiles.sizes.double() * sparsity
    counts = wanted.floor().long()
    left = round(float(tiles.sizes.sum()) * sparsity) - int(counts.sum())
    counts[(counts - wanted).argsort(stable=True)[:left]] += 1
    return counts


def ranks(score: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """The rank of every weight in its tile [rows, columns], 0 being the lowest score; among equal
    ones the first in the layer is lower."""
    of = tiles.of.expand_as(score).flatten()
    order = score.flatten().argsort(stable=True)
    order = order[of[order].argsort(stable=True)]
    starts = tiles.sizes.cumsum(0) - tiles.sizes
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=score.device) - starts[of[order]]
    return places.reshape(score.shape)


def kept(rank: torch.Tensor, tiles: Tiles, counts: torch.Tensor) -> torch.Tensor:
    """bool [rows, columns]: all but the `counts` lowest of each tile"""
    return rank >= counts[tiles.of]


def moved_counts(
    weight: torch.Tensor, gram: torch.Tensor, rank: torch.Tensor, tiles: Tiles, counts: torch.Tensor
) -> torch.Tensor:
    """Counts with the same sum and a lower layer error.

    As long as the error falls, the tiles where the next weights cost least drop some more, and as
    many come back where they gain most. Prices are exact for one weight, the error for all.
    """
    share, error, removed_gram = FIRST_SHARE, *_error(weight, gram, kept(rank, tiles, counts))
    for _ in range(MOST_MOVES):
        moved = _moved_once(weight, gram, rank, tiles, counts, removed_gram, share)
        new_error, new_gram = (
            (error, removed_gram)
            if moved is None
            else _error(weight, gram, kept(rank, tiles, moved))
        )
        if moved is not None and new_error < error:
            counts, error, removed_gram = moved, new_error, new_gram
        elif share > LAST_SHARE:
            share /= 2
        else:
            break
    return counts


def _error(
    weight: torch.Tensor, gram: torch.Tensor, stays: torch.Tensor
) -> tuple[float, torch.Tensor]:
    removed = weight.masked_fill(stays, 0)
    removed_gram = removed @ gram
    return float((removed_gram * removed).sum()), removed_gram


def _moved_once(
    weight, gram, rank, tiles: Tiles, counts, removed_gram, share: float
) -> torch.Tensor | None:
    """Pairs of tiles, in the order of what they promise, exchange weights; None when no pair
    promises a gain."""
    step = (tiles.sizes * share).long().clamp_min(1)
    up, down = step.minimum(tiles.sizes - counts), step.minimum(counts)
    of, first = tiles.of.expand_as(rank), counts[tiles.of]
    going = (rank >= first) & (rank < first + up[tiles.of])
    coming = (rank < first) & (rank >= first - down[tiles.of])
    cost = _means(drop_costs(weight, gram, removed_gram), going, of, up)
    gain = _means(keep_gains(weight, gram, removed_gram), coming, of, down)
    cost[up == 0], gain[down == 0] = torch.inf, -torch.inf
    moved, used = counts.clone(), set()
    givers, takers = (
        cost.argsort(stable=True).tolist(),
        gain.argsort(stable=True, descending=True).tolist(),
    )
    for giver, taker in zip(givers, takers, strict=True):
        if giver in used or taker in used or giver == taker or not gain[taker] > cost[giver]:
            break
        amount = min(int(up[giver]), int(down[taker]))
        moved[giver] += amount
        moved[taker] -= amount
        used |= {giver, taker}
    return moved if used else None


def _means(
    values: torch.Tensor, chosen: torch.Tensor, of: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Mean of the chosen values in each tile [tiles]"""
    sums = torch.zeros(len(counts), dtype=values.dtype, device=values.device)
    return sums.index_add_(0, of[chosen], values[chosen]) / counts.clamp_min(1)
