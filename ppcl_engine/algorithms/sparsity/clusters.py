"""Clusters of a layer's rows and columns: k-means on how large, how peaked and how uneven what they
carry is.

That weights of DiTs cluster in two dimensions is said by arXiv 2607.00927, of which the abstract
alone is public; features, start and number of clusters are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CLUSTERS, MOST_CLUSTERS, ROUNDS = 4, 8, 20
LEAST = 1e-30


@dataclass(frozen=True)
class Structure:
    """Known groups of a layer, by their sizes in order: of its rows (heads, chunks of a modulation,
    q | k | v | mlp) and of its columns (heads, attention | mlp). Empty: not known."""

    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()


def features(carried: torch.Tensor) -> torch.Tensor:
    """carried [n, m], values of n rows -> [n, 3]: log energy, kurtosis, log of max / median of the
    sizes; each with mean 0 and variance 1 over the rows."""
    squares = carried.square()
    energy = squares.mean(1)
    kurtosis = squares.square().mean(1) / energy.square().clamp_min(LEAST)
    sizes = carried.abs()
    peak = sizes.amax(1) / sizes.median(1).values.clamp_min(LEAST)
    found = torch.stack(
        [energy.clamp_min(LEAST).log(), kurtosis, peak.clamp_min(LEAST).log()], dim=1
    )
    spread = found.std(0, correction=0)
    return (found - found.mean(0)) / torch.where(spread > 0, spread, torch.ones_like(spread))


def start_labels(found: torch.Tensor, known: tuple[int, ...]) -> torch.Tensor:
    """The known groups, neighbours together where they are many; without them equal parts by
    energy. [n]"""
    if len(known) > 1:
        groups = torch.repeat_interleave(torch.arange(len(known)), torch.tensor(known)).to(
            found.device
        )
        return groups * min(MOST_CLUSTERS, len(known)) // len(known)
    place = torch.empty(len(found), dtype=torch.int64, device=found.device)
    place[found[:, 0].argsort(stable=True)] = torch.arange(len(found), device=found.device)
    return place * min(CLUSTERS, len(found)) // len(found)


def k_means(points: torch.Tensor, labels: torch.Tensor, rounds: int = ROUNDS) -> torch.Tensor:
    """Labels [n] of Lloyd's algorithm from a start; a cluster that loses all its points is gone,
    the others are numbered from 0 without gaps."""
    for _ in range(rounds):
        names = labels.unique()
        centres = torch.stack([points[labels == name].mean(0) for name in names])
        nearest = torch.cdist(points, centres).argmin(1)
        if torch.equal(names[nearest], labels):
            break
        labels = names[nearest]
    return labels.unique(return_inverse=True)[1]


def cluster_rows_and_columns(
    weight: torch.Tensor, energy: torch.Tensor, structure: Structure
) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels of the rows, labels of the columns), of what each weight carries: W_ij sqrt(E_j)"""
    carried = weight * energy.sqrt()
    rows, columns = features(carried), features(carried.T)
    return k_means(rows, start_labels(rows, structure.rows)), k_means(
        columns, start_labels(columns, structure.columns)
    )
