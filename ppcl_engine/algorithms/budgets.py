"""The least damage within a budget: dynamic programming over Pareto fronts of (size, damage).

A front holds the ways to decide a part of a model of which no other is both smaller and better. Parts
that are decided independently add up (`together`); ways that exclude each other are joined (`either`).
Intervals to replace and the bits of matrices are chosen by it, alone and under one budget.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Front:
    """Ways to decide a part, from the largest and best to the smallest."""

    size: np.ndarray
    """of each way, falling"""
    damage: np.ndarray
    """of each way, rising"""
    made_of: tuple[tuple[Any, np.ndarray], ...]
    """(what, which of it in each way): a front, or a list of what is chosen; -1: not in this way"""

    @property
    def smallest(self) -> float:
        return float(self.size[-1])

    def within(self, budget: float) -> int | None:
        """The way of least damage within the budget; None where nothing fits."""
        fits = np.flatnonzero(self.size <= budget)
        return int(fits[0]) if len(fits) else None

    def chosen(self, way: int) -> list[Hashable]:
        """What one way is made of, in the order of the parts."""
        found: list[Hashable] = []
        waiting: list[tuple[Any, int]] = [(self, way)]
        while waiting:  # no recursion: a model has more matrices than Python allows calls
            what, index = waiting.pop()
            if isinstance(what, Front):
                parts = [(part, int(which[index])) for part, which in what.made_of]
                waiting += [(part, which) for part, which in reversed(parts) if which >= 0]
            elif what[index] is not None:
                found.append(what[index])
        return found


def front(options: Iterable[tuple[float, float, Hashable]]) -> Front:
    """options: (size, damage, what is chosen; None: nothing)."""
    size, damage, names = zip(*options, strict=True)
    return _pareto(np.array(size), np.array(damage), ((names, np.arange(len(names))),))


def together(parts: Sequence[Front], most: int | None = None) -> Front:
    """All parts: sizes and damages add up. most: about how many ways are kept of a sum, evenly over
    its sizes; without it the result is exact."""
    total = parts[0]
    for part in parts[1:]:
        size, damage = (
            np.add.outer(ours, theirs).ravel()
            for ours, theirs in ((total.size, part.size), (total.damage, part.damage))
        )
        left, right = (grid.ravel() for grid in np.indices((len(total.size), len(part.size))))
        total = _pareto(size, damage, ((total, left), (part, right)), most)
    return total


def either(*parts: Front) -> Front:
    """One of these."""
    made_of, first = [], 0
    count = sum(len(part.size) for part in parts)
    for part in parts:
        which = np.full(count, -1)
        which[first : first + len(part.size)] = np.arange(len(part.size))
        made_of.append((part, which))
        first += len(part.size)
    size, damage = (np.concatenate([getattr(p, n) for p in parts]) for n in ("size", "damage"))
    return _pareto(size, damage, tuple(made_of))


def _pareto(size: np.ndarray, damage: np.ndarray, made_of: tuple, most: int | None = None) -> Front:
    """Drops every way that another one equals or beats in both."""
    order = np.lexsort((size, damage))
    least = np.minimum.accumulate(size[order])
    order = order[np.concatenate([[True], least[1:] < least[:-1]])]
    if most is not None and len(order) > most:
        order = order[_spread(size[order], most)]
    return Front(size[order], damage[order], tuple((what, w[order]) for what, w in made_of))


def _spread(size: np.ndarray, most: int) -> np.ndarray:
    """The first of each of `most` equal steps of falling sizes, and the smallest."""
    step = np.floor((size[0] - size) * most / (size[0] - size[-1]))
    return np.concatenate([[True], step[1:] != step[:-1]]) | (np.arange(len(size)) == len(size) - 1)
