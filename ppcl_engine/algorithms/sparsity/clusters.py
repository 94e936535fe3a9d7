"""Clusters of a layer's rows and columns: k-means on the size, peakedness and unevenness of what
they carry.

That the weights of DiTs cluster in two dimensions is a claim of arXiv 2607.00927, of which only the
abstract is public; features, start and number of clusters are our own choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CLUSTERS, MOST_CLUSTERS, ROUNDS = 4, 8, 20
LEAST = 1e-30


@dataclass(frozen=True)
class KnownGroups:
    """Groups of rows and of columns that an architecture is known to have in a layer, by their sizes in
    order; empty: none is known."""

    rows: tuple[int, ...] = ()
    """heads, chunks of a modulation, q | k | v | mlp"""
    columns: tuple[int, ...] = ()
    """heads, attention | mlp"""


def features(carried: torch.Tensor) -> torch.Tensor:
    """carried [n, m], values of n rows -> [n, 3]: log energy, kurtosis, log of max / median of the
    sizes; each with mean 0 and variance 1 over the rows."""
    squares = carried.square()
    energy = squares.mean(1)
    kurtosis = squares.square().mean(1) / energy.square().clamp_min(LEAST)
    sizes = carried.abs()
    peak = sizes.amax(1) / sizes.median(1).values.clamp_min(LEAST)
    values = torch.stack(
        [energy.clamp_min(LEAST).log(), kurtosis, peak.clamp_min(LEAST).log()], dim=1
    )
    spread = values.std(0, correction=0)
    return (values - values.mean(0)) / torch.where(spread > 0, spread, torch.ones_like(spread))


def start_labels(points: torch.Tensor, known: tuple[int, ...]) -> torch.Tensor:
    """The known groups, neighbouring ones merged where there are many; without them equal parts by
    energy. [n]"""
    if len(known) > 1:
        groups = torch.repeat_interleave(torch.arange(len(known)), torch.tensor(known)).to(
            points.device
        )
        return groups * min(MOST_CLUSTERS, len(known)) // len(known)
    place = torch.empty(len(points), dtype=torch.int64, device=points.device)
    place[points[:, 0].argsort(stable=True)] = torch.arange(len(points), device=points.device)
    return place * min(CLUSTERS, len(points)) // len(points)


def k_means(points: torch.Tensor, labels: torch.Tensor, rounds: int = ROUNDS) -> torch.Tensor:
    """Labels [n] of Lloyd's algorithm from a given start. A cluster that loses all its points
    disappears; the others are numbered from 0 without gaps."""
    for _ in range(rounds):
        names = labels.unique()
        centres = torch.stack([points[labels == name].mean(0) for name in names])
        nearest = torch.cdist(points, centres).argmin(1)
        if torch.equal(names[nearest], labels):
            break
        labels = names[nearest]
    return labels.unique(return_inverse=True)[1]


def cluster_rows_and_columns(
    weight: torch.Tensor, energy: torch.Tensor, groups: KnownGroups
) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels of the rows, labels of the columns), by what each weight carries: W_ij sqrt(E_j)."""
    carried = weight * energy.sqrt()
    rows, columns = features(carried), features(carried.T)
    return k_means(rows, start_labels(rows, groups.rows)), k_means(
        columns, start_labels(columns, groups.columns)
    )
