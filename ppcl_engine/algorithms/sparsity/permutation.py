"""Columns in another order for N:M: groups of neighbours that are not all important lose less.

Channel permutation (Pool and Yu, NeurIPS 2021), in the way of RIA's paper for large layers: columns
are first dealt out by importance, then groups exchange one member; ours exchanges pairs as long as
that helps, where the paper solves an assignment problem. The layer before must give its outputs in
the new order, which costs nothing for a linear map.
"""

from __future__ import annotations

import torch

from .patterns import Pattern, kept_of_groups

ROUNDS = 4
NUMBERS_AT_ONCE = 1 << 26


def kept_score(score: torch.Tensor, order: torch.Tensor, pattern: Pattern) -> float:
    """Sum of the scores that N:M keeps when the columns are in this order."""
    ordered = score[:, order]
    return float(ordered.masked_fill(~kept_of_groups(ordered, pattern), 0).sum())


def column_order(score: torch.Tensor, pattern: Pattern, sections: int = 1) -> torch.Tensor:
    """An order [columns] that keeps at least as much of `score` [rows, columns] as the present one.

    sections: equal runs of columns that each stay together (heads).
    """
    width = score.shape[1] // sections
    parts = [
        _section_order(score[:, n * width : (n + 1) * width], pattern) + n * width
        for n in range(sections)
    ]
    return torch.cat(parts)


def _section_order(score: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    present = torch.arange(score.shape[1], device=score.device)
    starts = (present, _dealt(score, pattern))
    orders = [_exchanged(score, order, pattern) for order in starts]
    return max(orders, key=lambda order: kept_score(score, order, pattern))


def _dealt(score: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The most important column goes to the first group, the next one to the second, and so on,
    like cards."""
    by_importance = score.sum(0).argsort(descending=True, stable=True)
    return by_importance.reshape(pattern.of, -1).T.flatten()


def _exchanged(score: torch.Tensor, order: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    groups = order.reshape(-1, pattern.of).clone()
    for _ in range(ROUNDS):
        before = groups.clone()
        for place in range(pattern.of):
            groups[:, place] = groups[exchanges(_values(score, groups, place, pattern)), place]
        if torch.equal(before, groups):
            break
    return groups.flatten()


def _values(
    score: torch.Tensor, groups: torch.Tensor, place: int, pattern: Pattern
) -> torch.Tensor:
    """[groups, groups]: what group a keeps when the member at `place` of group b replaces its
    own"""
    others = groups[:, [p for p in range(pattern.of) if p != place]]
    best = score[:, others].sort(dim=-1, descending=True).values  # [rows, groups, of - 1]
    sure, last = best[..., : pattern.keep - 1].sum(-1), best[..., pattern.keep - 1]
    coming = score[:, groups[:, place]]
    at_once = max(1, NUMBERS_AT_ONCE // coming.numel())
    parts = [
        sure[:, some].sum(0)[:, None] + torch.maximum(last[:, some, None], coming[:, None]).sum(0)
        for some in torch.arange(len(groups), device=score.device).split(at_once)
    ]
    return torch.cat(parts)


def exchanges(values: torch.Tensor) -> torch.Tensor:
    """values [n, n]: of member b in group a -> which member goes to which group [n].

    By exchanges of two that each raise the sum, the best first, until none does.
    """
    members = torch.arange(len(values), device=values.device)
    for _ in range(2 * len(values)):
        now = values[:, members]
        own = now.diagonal()
        gains = now + now.T - own[:, None] - own[None]
        best, partner = gains.max(1)
        chosen, used = [], set()
        for a in best.argsort(descending=True).tolist():
            b = int(partner[a])
            if not best[a] > 1e-12 * own[a].abs():
                break
            if a not in used and b not in used:
                chosen.append((a, b))
                used |= {a, b}
        if not chosen:
            break
        for a, b in chosen:
            members[[a, b]] = members[[b, a]]
    return members
