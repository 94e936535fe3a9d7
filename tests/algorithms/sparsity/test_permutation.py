"""Orders of columns against brute force."""

import itertools

import pytest
import torch

from ppcl_engine.algorithms.sparsity.patterns import pattern_named
from ppcl_engine.algorithms.sparsity.permutation import column_order, exchanges, kept_score

PATTERN = pattern_named("2:4")


def random_score(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(rows, columns, generator=generator)
        * torch.rand(columns, generator=generator).exp()
    )


@pytest.mark.parametrize("seed", range(4))
def test_an_order_of_eight_columns_is_near_the_best_of_all(seed):
    score = random_score(6, 8, seed)
    rest = set(range(1, 8))
    every = [[0, *some, *sorted(rest - set(some))] for some in itertools.combinations(rest, 3)]
    best = max(kept_score(score, torch.tensor(order), PATTERN) for order in every)
    found, present = (
        kept_score(score, o, PATTERN) for o in (column_order(score, PATTERN), torch.arange(8))
    )
    assert present < found <= best + 1e-4
    assert found - present > 0.7 * (best - present)


def test_important_columns_side_by_side_are_parted():
    score = torch.ones(4, 16)
    score[:, :4] = 100
    order = column_order(score, PATTERN)
    assert sorted(order.tolist()) == list(range(16))
    assert kept_score(score, order, PATTERN) == 4 * (4 * 100 + 4)


def test_sections_stay_together():
    order = column_order(random_score(5, 24), PATTERN, sections=3)
    assert all(
        sorted(order[8 * n : 8 * n + 8].tolist()) == list(range(8 * n, 8 * n + 8)) for n in range(3)
    )


def test_no_exchange_of_two_is_left_that_helps():
    values = torch.rand(9, 9, generator=torch.Generator().manual_seed(1))
    found = exchanges(values)
    assert sorted(found.tolist()) == list(range(9))
    now = values[:, found]
    for a, b in itertools.combinations(range(9), 2):
        assert now[a, b] + now[b, a] <= now[a, a] + now[b, b] + 1e-6
