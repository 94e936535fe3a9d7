"""The least damage within a budget, against trying everything."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl_engine.algorithms.budgets import either, front, together
from ppcl_engine.algorithms.few_bits.feedback import fed_back
from ppcl_engine.algorithms.sparsity.compensation import inverse_factor

WAYS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4)


def named(part: int, ways: list[tuple[int, int]]) -> list[tuple[int, int, tuple]]:
    return [(size, damage, (part, way)) for way, (size, damage) in enumerate(ways)]


@settings(deadline=None, max_examples=60)
@given(st.lists(WAYS, min_size=1, max_size=4), WAYS, st.integers(0, 40))
def test_the_choice_equals_brute_force(parts, instead, budget):
    """Of some parts, each in one of its ways; or of another part in place of all of them."""
    ways = [named(number, part) for number, part in enumerate(parts)]
    other = named(len(parts), instead)
    total = either(together([front(part) for part in ways]), front(other))
    every = [*itertools.product(*ways), *((way,) for way in other)]
    fitting = [sum(w[1] for w in choice) for choice in every if sum(w[0] for w in choice) <= budget]
    way = total.within(budget)
    if not fitting:
        assert way is None and total.smallest > budget
        return
    by_name = {name: (size, damage) for size, damage, name in itertools.chain(*ways, other)}
    chosen = [by_name[name] for name in total.chosen(way)]
    assert sum(size for size, _ in chosen) == total.size[way] <= budget
    assert sum(damage for _, damage in chosen) == min(fitting)


def test_of_many_ways_those_are_kept_that_cover_all_sizes():
    parts = [front([(2**n, 0.0, (n, 1)), (0, 2.0**n, (n, 0))]) for n in range(12)]
    exact, thin = together(parts), together(parts, most=200)
    assert len(exact.size) > 1000 > 220 > len(thin.size) and thin.smallest == exact.smallest
    for budget in (500, 1000, 3000):
        least, found = (f.damage[f.within(budget)] for f in (exact, thin))
        assert least <= found < 1.1 * least


def test_columns_make_up_for_those_before_them():
    """Two equal inputs: what rounding takes from the first column, the second gives back."""
    weight = torch.tensor([[0.4, 0.4], [0.3, 0.0]], dtype=torch.float64)
    gram = torch.ones(2, 2, dtype=torch.float64) + 1e-9 * torch.eye(2, dtype=torch.float64)
    found = fed_back(weight, inverse_factor(gram), torch.round, 1)
    assert found[0].sum() == pytest.approx(1.0) and found[1].sum() == pytest.approx(0.0)
