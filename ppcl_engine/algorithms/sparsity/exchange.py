"""Improves a mask: in every row, dropped weights come back in exchange for others, as long as the
exact error of the layer falls."""

from __future__ import annotations

import torch

from .layer import drop_costs, keep_gains
from .patterns import Pattern

MOST_SWEEPS = 256
LEAST_GAIN = 1e-9  # of the row's error; less is rounding


def exchanged(
    weight: torch.Tensor, gram: torch.Tensor, stays: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    """Which weights stay after exchanging one weight of a row for another (for N:M: inside a
    group).

    Each sweep makes the best exchange in every row, by the exact change of tr(D G D^T), including
    the correlation of the two. Rows and groups keep their counts. As in DSnoT (Zhang et al. 2023,
    arXiv 2310.08915), which prices exchanges by expected reconstruction errors.
    """
    of, stays = pattern.of or weight.shape[1], stays.clone()
    removed_gram = weight.masked_fill(stays, 0) @ gram
    active = torch.arange(len(weight), device=weight.device)
    for _ in range(MOST_SWEEPS):
        coming, going, change = _best_pairs(
            weight[active], gram, stays[active], removed_gram[active], of
        )
        error = (removed_gram[active] * weight[active].masked_fill(stays[active], 0)).sum(1)
        helps = change < -LEAST_GAIN * error
        active, coming, going = active[helps], coming[helps], going[helps]
        if not len(active):
            break
        stays[active, coming], stays[active, going] = True, False
        removed_gram[active] += (
            weight[active, going, None] * gram[going] - weight[active, coming, None] * gram[coming]
        )
    return stays


def _best_pairs(
    weight: torch.Tensor,
    gram: torch.Tensor,
    stays: torch.Tensor,
    removed_gram: torch.Tensor,
    of: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each row (column that comes back, column that goes, change of the error).

    The best pair among those that contain the weight that alone gains most by coming back, or costs
    least by going.
    """
    groups = (len(weight), -1, of)
    columns = torch.arange(weight.shape[1], device=weight.device).reshape(-1, of)
    weights = weight.reshape(groups)
    costs = drop_costs(weight, gram, removed_gram).masked_fill(~stays, torch.inf).reshape(groups)
    losses = (
        keep_gains(weight, gram, removed_gram).masked_fill(stays, -torch.inf).reshape(groups).neg()
    )
    by_coming = _partners(losses, costs, weights, gram, columns)
    by_going = _partners(costs, losses, weights, gram, columns)
    change, choice = torch.cat([by_coming[2], by_going[2]], 1).min(1)
    coming, going = (
        torch.cat(pair, 1) for pair in ((by_coming[0], by_going[1]), (by_coming[1], by_going[0]))
    )
    return coming.gather(1, choice[:, None])[:, 0], going.gather(1, choice[:, None])[:, 0], change


def _partners(
    first: torch.Tensor,
    second: torch.Tensor,
    weights: torch.Tensor,
    gram: torch.Tensor,
    columns: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For the cheapest of `first` in every group, the partner in `second` that makes the pair
    cheapest: (column of the one, column of the other, change), each [rows, groups]. The pair's own
    term: -2 W_a W_b G_ab."""
    price, one = first.min(-1)
    places = torch.arange(len(columns), device=columns.device)
    own, column = weights.gather(-1, one[..., None]), columns[places, one]
    together = price[..., None] + second - 2 * own * weights * gram[column[..., None], columns]
    change, other = together.min(-1)
    return column, columns[places, other], change
