"""Rules that turn curves into intervals: the paper's greedy rule, and dynamic programming. Pure
functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..budgets import front, together

Cka = Callable[[int, int], float]
DEGENERATE = 1e-4  # max D of an untrained model is 1e-5
PUBLISHED_SHARE = 25 / 60
"""of the blocks, that the paper removes of Qwen-Image"""


@dataclass(frozen=True)
class GreedyInterval:
    """An interval, and why it ends where it does."""

    first: int
    """its first block"""
    last: int
    """its last block; equal to `first`: the block stays"""
    reason: str
    """why it ends there"""


def first_difference(cka: Cka, first: int, k: int) -> float:
    """D(u, k) = cka(u, k-1) - cka(u, k), with cka(u, u) = 1 (paper, equation 4)."""
    return (1.0 if k - 1 == first else cka(first, k - 1)) - cka(first, k)


def reach(first: int, num_blocks: int, longest: int, starts: frozenset[int] = frozenset()) -> int:
    """The last block that an interval from `first` may contain. `starts`: first blocks of runs of
    one kind."""
    end = min((start for start in starts if start > first), default=num_blocks)
    return min(first + longest, end) - 1


def pairs(
    num_blocks: int, longest: int, starts: frozenset[int] = frozenset()
) -> list[tuple[int, int]]:
    """Every (u, k) that may be an interval, in order."""
    ends = {u: reach(u, num_blocks, longest, starts) for u in range(num_blocks)}
    return [(u, k) for u, end in ends.items() for k in range(u + 1, end + 1)]


def largest_difference(
    cka: Cka, num_blocks: int, longest: int, starts: frozenset[int] = frozenset()
) -> float:
    """The largest D of all curves."""
    return max(
        (first_difference(cka, u, k) for u, k in pairs(num_blocks, longest, starts)), default=0.0
    )


def curve_scale(
    cka: Cka, num_blocks: int, longest: int, starts: frozenset[int] = frozenset()
) -> float:
    """`largest_difference`. Raises ValueError for a degenerate teacher."""
    scale = largest_difference(cka, num_blocks, longest, starts)
    if not scale >= DEGENERATE:
        raise ValueError(
            f"the CKA curves are flat (largest first difference {scale:.1e} < {DEGENERATE:.0e}): "
            "the model looks untrained, so any interval would be arbitrary; check the model file"
        )
    return scale


def greedy_intervals(
    cka: Cka,
    num_blocks: int,
    longest: int,
    scale: float,
    eps: float,
    max_drop: float,
    protect: frozenset[int],
    starts: frozenset[int] = frozenset(),
) -> list[GreedyInterval]:
    """The paper's rule: D falls while blocks belong together; the first rise ends the interval.

    D(u, u) = infinity; stop at the first k with D(u, k) > D(u, k-1) + eps * scale; [u, k-1];
    restart at k. Block u stays single when D(u, u+1) > max_drop * scale. Covers every block. No
    interval goes beyond one of `starts`, the first blocks of runs of one kind.
    """
    intervals, u = [], 0
    while u < num_blocks:
        intervals.append(_grow(cka, u, num_blocks, longest, scale, eps, max_drop, protect, starts))
        u = intervals[-1].last + 1
    return intervals


def _grow(cka, u, num_blocks, longest, scale, eps, max_drop, protect, starts) -> GreedyInterval:
    if u in protect:
        return GreedyInterval(u, u, "protected")
    previous = math.inf
    for k in range(u + 1, num_blocks):
        if k in protect:
            return GreedyInterval(u, k - 1, f"block {k} is protected")
        if k in starts:
            return GreedyInterval(u, k - 1, f"block {k} is of another kind")
        if k - u >= longest:
            return GreedyInterval(u, k - 1, f"longest interval considered is {longest}")
        d = first_difference(cka, u, k)
        if k == u + 1 and d > max_drop * scale:
            return GreedyInterval(
                u,
                u,
                f"D({u},{k}) = {d:.5f} > max_drop x scale = {max_drop * scale:.5f}: stays single",
            )
        if d > previous + eps * scale:
            return GreedyInterval(
                u,
                k - 1,
                f"D rises: D({u},{k}) = {d:.5f} > D({u},{k - 1}) = {previous:.5f} + {eps * scale:.5f}",
            )
        previous = d
    return GreedyInterval(u, num_blocks - 1, "last block")


def budget_intervals(
    cost: Callable[[int, int], float],
    num_blocks: int,
    longest: int,
    remove: int,
    protect: frozenset[int],
    starts: frozenset[int] = frozenset(),
) -> list[tuple[int, int]]:
    """The disjoint intervals that remove exactly `remove` blocks at the least sum of costs.

    cost(u, v): damage of replacing u..v by one block (nearly additive over intervals). An interval
    may contain no protected block, and one of `starts` only as its first. O(num_blocks * longest *
    remove). Raises ValueError when the budget cannot be met.
    """
    best = [[math.inf] * (remove + 1) for _ in range(num_blocks + 1)]
    choice: dict[tuple[int, int], int] = {}
    best[0][0] = 0.0
    for end in range(1, num_blocks + 1):  # blocks 0..end-1 are decided
        for removed in range(remove + 1):
            best[end][removed], choice[end, removed] = best[end - 1][removed], 1
            for length in range(2, min(longest, end, removed + 1) + 1):
                start = end - length
                if protect.intersection(range(start, end)) or starts.intersection(
                    range(start + 1, end)
                ):
                    break
                total = best[start][removed - length + 1] + cost(start, end - 1)
                if total < best[end][removed]:
                    best[end][removed], choice[end, removed] = total, length
    if math.isinf(best[num_blocks][remove]):
        raise ValueError(
            f"{remove} blocks cannot be removed with intervals of at most {longest}; lower --remove"
        )
    intervals, end, removed = [], num_blocks, remove
    while end:
        length = choice[end, removed]
        if length > 1:
            intervals.append((end - length, end - 1))
        end, removed = end - length, removed - length + 1
    return intervals[::-1]


def stability(chosen: list[tuple[int, int]], resampled: list[list[tuple[int, int]]]) -> list[float]:
    """For each chosen interval, the share of resamples that contain it with the same ends."""
    return [
        sum(interval in other for other in resampled) / max(1, len(resampled))
        for interval in chosen
    ]


def least_damage(items: list[tuple[float, float]], saving: float) -> list[int] | None:
    """Which items to switch on so that their savings reach `saving` at the least damage; exact.

    items: (saving, damage), damage additive. None when all together save too little.
    """
    switches = [front([(0, 0, None), (-s, d, index)]) for index, (s, d) in enumerate(items)]
    nothing = front([(0, 0, None)])
    ways = together([nothing, *switches])
    way = ways.within(-saving)
    return None if way is None else [i for i in ways.chosen(way) if isinstance(i, int)]
