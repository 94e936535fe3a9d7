"""The greedy rule on curves made by hand, and the solvers against brute force."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl_engine.algorithms.detection.intervals import (
    budget_intervals,
    curve_scale,
    first_difference,
    greedy_intervals,
    least_damage,
    least_damages,
    stability,
)

STEPS = [0.0, 0.10, 0.05, 0.04, 0.30, 0.02, 0.40, 0.41]  # D(u, k) = STEPS[k] for every u


def curve(u: int, k: int) -> float:
    return 1 - sum(STEPS[u + 1 : k + 1])


def spans(eps=0.0, max_drop=2.0, longest=8, protect=()) -> list[tuple[int, int]]:
    found = greedy_intervals(
        curve, len(STEPS), longest, max(STEPS), eps, max_drop, frozenset(protect)
    )
    return [(f.first, f.last) for f in found]


def test_the_first_difference_starts_from_one():
    # cka(2, 2) is 1 by definition, not read
    assert first_difference(curve, 2, 3) == pytest.approx(0.04)
    assert first_difference(curve, 1, 4) == pytest.approx(0.30)
    never = first_difference(lambda u, k: {(2, 3): 0.75}[u, k], 2, 3)
    assert never == 0.25


def test_the_first_rise_ends_an_interval():
    assert spans() == [(0, 3), (4, 5), (6, 7)]


def test_a_large_first_drop_leaves_a_block_single():
    assert spans(max_drop=0.5) == [(0, 3), (4, 5), (6, 6), (7, 7)]
    assert spans(max_drop=0.2) == [(0, 0), (1, 3), (4, 5), (6, 6), (7, 7)]


def test_a_small_rise_ends_nothing():
    assert spans(eps=0.62) == [(0, 3), (4, 5), (6, 7)]  # 0.30 > 0.04 + 0.62 * 0.41
    # 0.30 < 0.04 + 0.65 * 0.41, and 0.40 > 0.02 + 0.65 * 0.41
    assert spans(eps=0.65) == [(0, 5), (6, 7)]
    assert spans(eps=1.0) == [(0, 7)]


def test_longest_and_protect():
    assert spans(longest=3) == [(0, 2), (3, 5), (6, 7)]
    assert spans(protect=[2]) == [(0, 1), (2, 2), (3, 5), (6, 7)]
    assert spans(protect=range(8)) == [(u, u) for u in range(8)]


def test_every_end_has_its_reason():
    found = greedy_intervals(curve, 8, 8, 0.41, 0.0, 0.5, frozenset([7]))
    reasons = {(f.first, f.last): f.reason for f in found}
    assert reasons[0, 3].startswith("D rises: D(0,4) = 0.30000 > D(0,3) = 0.04000")
    assert reasons[6, 6] == "block 7 is protected" and reasons[7, 7] == "protected"


def test_the_scale_is_the_largest_difference():
    assert curve_scale(curve, 8, 8) == pytest.approx(0.41)
    assert curve_scale(curve, 7, 3) == pytest.approx(0.40)


@pytest.mark.parametrize("slope", [0.0, 9e-5, math.nan])
def test_a_flat_curve_is_refused(slope):
    with pytest.raises(ValueError, match="looks untrained"):
        curve_scale(lambda u, k: 1 - slope * (k - u), 8, 8)
    assert curve_scale(lambda u, k: 1 - 2e-4 * (k - u), 8, 8) == pytest.approx(2e-4)


def all_sets(blocks: int, longest: int, protect: frozenset[int]):
    """Every set of disjoint intervals, as a tuple of pairs."""
    if not blocks:
        yield ()
        return
    for length in range(1, min(longest, blocks) + 1):
        span = (blocks - length, blocks - 1)
        if length == 1 or not protect.intersection(range(span[0], span[1] + 1)):
            for rest in all_sets(blocks - length, longest, protect):
                yield (*rest, span) if length > 1 else rest


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_budget_programme_equals_brute_force(data):
    blocks = data.draw(st.integers(2, 9))
    longest, remove = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 7))
    protect = frozenset(data.draw(st.sets(st.integers(0, blocks - 1), max_size=2)))
    costs = {
        pair: data.draw(st.integers(0, 1000)) for pair in itertools.combinations(range(blocks), 2)
    }

    def total(chosen):
        return sum(costs[pair] for pair in chosen)

    possible = [s for s in all_sets(blocks, longest, protect) if sum(v - u for u, v in s) == remove]
    if not possible:
        with pytest.raises(ValueError, match=f"{remove} blocks cannot be removed"):
            budget_intervals(lambda u, v: costs[u, v], blocks, longest, remove, protect)
        return
    chosen = budget_intervals(lambda u, v: costs[u, v], blocks, longest, remove, protect)
    assert tuple(chosen) in possible
    assert total(chosen) == min(map(total, possible))
    sums = least_damages(lambda u, v: costs[u, v], blocks, longest, remove, protect)
    assert sums[remove] == total(chosen) and len(sums) == remove + 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=8), st.integers(-5, 120)
)
def test_least_damage_equals_brute_force(items, saving):
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(items)), r) for r in range(len(items) + 1)
    )
    enough = [sum(items[i][1] for i in s) for s in subsets if sum(items[i][0] for i in s) >= saving]
    chosen = least_damage(items, saving)
    if not enough:
        assert chosen is None
        return
    assert len(set(chosen)) == len(chosen)
    assert sum(items[i][0] for i in chosen) >= saving
    assert sum(items[i][1] for i in chosen) == min(enough)


def test_stability_counts_equal_ends_only():
    again = [[(0, 2), (4, 5)], [(0, 2)], [(0, 3), (4, 5)], [(0, 2), (4, 5)]]
    assert stability([(0, 2), (4, 5), (6, 7)], again) == [0.75, 0.75, 0.0]
