"""Kernel alignment against the sums that define it, ridge regression against lstsq and closed forms."""

import itertools

import pytest
import torch

from ppcl_engine.similarity import (
    NormalEquations,
    biased_hsic,
    bootstrap_interval,
    bootstrap_ratio,
    bootstrap_subsets,
    cka,
    hsic,
    linear_gram,
    rbf_gram,
    wilson_interval,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_hsic(k: torch.Tensor, l: torch.Tensor) -> float:  # noqa: E741
    """Means over distinct indices: K_ij L_ij - 2 K_ij L_iq + K_ij L_qr (the U-statistic itself)."""
    k, l, n = k.tolist(), l.tolist(), len(k)  # noqa: E741

    def mean(terms):
        terms = list(terms)
        return sum(terms) / len(terms)

    distinct = itertools.permutations
    pairs = mean(k[i][j] * l[i][j] for i, j in distinct(range(n), 2))
    triples = mean(k[i][j] * l[i][q] for i, j, q in distinct(range(n), 3))
    quadruples = mean(k[i][j] * l[q][r] for i, j, q, r in distinct(range(n), 4))
    return pairs - 2 * triples + quadruples


@pytest.mark.parametrize("gram", [linear_gram, rbf_gram])
def test_hsic_is_the_unbiased_estimator(gram):
    x = normal(7, 3)
    k, l = gram(x), gram(x[:, :1].square() + normal(7, 2, seed=1))  # noqa: E741
    assert float(hsic(k, l)) == pytest.approx(naive_hsic(k, l), rel=1e-10)


def test_subsets_equal_the_call_on_their_rows():
    k, l = linear_gram(normal(12, 4)), rbf_gram(normal(12, 4, seed=1))  # noqa: E741
    chosen = torch.zeros(12, 3)
    rows = [list(range(12)), [0, 2, 3, 7, 11], [1, 4, 5, 6, 8, 9]]
    for column, subset in enumerate(rows):
        chosen[subset, column] = 1
    direct = [float(hsic(k[s][:, s], l[s][:, s])) for s in rows]
    assert hsic(k, l, chosen).tolist() == pytest.approx(direct, rel=1e-10)
    direct = [float(biased_hsic(k[s][:, s], l[s][:, s])) for s in rows]
    assert biased_hsic(k, l, chosen).tolist() == pytest.approx(direct, rel=1e-10)
    direct = [float(cka(k[s][:, s], k[s][:, s] ** 2)) for s in rows]
    assert cka(k, k**2, chosen).tolist() == pytest.approx(direct, rel=1e-10)


@pytest.mark.parametrize("gram", [linear_gram, rbf_gram])
def test_alignment_ignores_rotation_scale_and_shift(gram):
    x, y = normal(40, 6), normal(40, 6, seed=1)
    y[:, :2] += x[:, :2]
    rotation = torch.linalg.qr(normal(6, 6, seed=2)).Q
    value = float(cka(gram(x), gram(y)))
    assert 0.1 < value < 0.9
    assert float(cka(gram(x @ rotation * 37 + 5), gram(y))) == pytest.approx(value, rel=1e-8)
    assert float(cka(gram(x), gram(x @ rotation * 37 + 5))) == pytest.approx(1, abs=1e-8)


def test_independent_data_do_not_align_where_the_biased_form_says_they_do():
    x, y = normal(60, 200), normal(60, 200, seed=1)
    assert abs(float(cka(linear_gram(x), linear_gram(y)))) < 0.05
    biased = cka(linear_gram(x), linear_gram(y), estimator=biased_hsic)
    centred = [m - m.mean(0) for m in (x, y)]
    products = [(a.T @ b).square().sum() for a, b in ((centred[0], centred[1]), (centred[0],) * 2, (centred[1],) * 2)]
    assert float(biased) == pytest.approx(float(products[0] / (products[1] * products[2]).sqrt())) and biased > 0.7
    assert float(cka(linear_gram(x), linear_gram(3 * x + 1), estimator=biased_hsic)) == pytest.approx(1)


def equations_of(x: torch.Tensor, y: torch.Tensor, parts: int = 1) -> NormalEquations:
    equations = NormalEquations(x.shape[1], y.shape[1])
    for rows in torch.arange(len(x)).chunk(parts):
        equations.add(x[rows], y[rows])
    return equations


def test_normal_equations_equal_lstsq():
    x, y = normal(50, 5) + 3, normal(50, 4, seed=1)
    solution = equations_of(x, y).solve(ridge=0.0)
    direct = torch.linalg.lstsq(torch.cat([x, torch.ones(50, 1)], 1), y).solution
    torch.testing.assert_close(solution.weight, direct[:-1].T)
    torch.testing.assert_close(solution.bias, direct[-1])
    error = (x @ solution.weight.T + solution.bias - y).square().sum()
    assert solution.residual == pytest.approx(float(error / (y - y.mean(0)).square().sum()), rel=1e-8)
    assert (solution.rank, solution.rows) == (5, 50)


def test_an_affine_map_is_found_whole():
    x, weight, bias = normal(30, 4) * 5 - 2, normal(3, 4, seed=1), normal(3, seed=2)
    solution = equations_of(x, x @ weight.T + bias).solve(ridge=0.0)
    torch.testing.assert_close(solution.weight, weight)
    torch.testing.assert_close(solution.bias, bias)
    assert abs(solution.residual) < 1e-10


def test_ridge_is_a_share_of_the_mean_diagonal_and_spares_the_bias():
    """With x centred, the bias is the mean of y and W shrinks as (X^T X + penalty)^-1 X^T Y."""
    x, y = normal(30, 4), normal(30, 2, seed=1) + 100
    x = x - x.mean(0)
    penalty = 0.3 * x.square().sum(0).mean()
    direct = torch.linalg.solve(x.T @ x + penalty * torch.eye(4, dtype=torch.float64), x.T @ y)
    solution = equations_of(x, y).solve(ridge=0.3)
    torch.testing.assert_close(solution.weight, direct.T)
    torch.testing.assert_close(solution.bias, y.mean(0))


def test_batches_add_up():
    x, y = normal(60, 5).float(), normal(60, 3, seed=1).float()
    whole, parts = equations_of(x, y).solve(1e-4), equations_of(x, y, parts=7).solve(1e-4)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=1e-10, atol=1e-12)
    assert (parts.rows, parts.residual) == (60, pytest.approx(whole.residual))


def test_missing_rank_is_reported_and_harmless():
    x = normal(50, 3) @ normal(3, 8, seed=1)
    y = x @ normal(8, 2, seed=2)
    solution = equations_of(x, y).solve(1e-8)
    assert solution.rank == 3
    torch.testing.assert_close(x @ solution.weight.T + solution.bias, y, rtol=1e-4, atol=1e-4)
    assert equations_of(normal(4, 8), normal(4, 2)).solve(1e-4).rank == 4


def test_bootstrap_intervals_cover_about_as_often_as_they_say():
    covered = shorter = 0
    for trial in range(150):
        values = normal(40, seed=trial)
        low, high = bootstrap_interval(values, seed=trial, resamples=300)
        covered += low <= 0 <= high
        low_half, high_half = bootstrap_interval(values, seed=trial, resamples=300, level=0.5)
        shorter += low < low_half < high_half < high
    assert 0.88 <= covered / 150 <= 0.99
    assert shorter == 150


def test_a_ratio_is_resampled_together():
    below = normal(50).square() + 0.1
    assert bootstrap_ratio(3 * below, below, seed=0) == pytest.approx((3, 3))
    low, high = bootstrap_ratio(normal(50, seed=1).square(), below, seed=0)
    assert low < float(normal(50, seed=1).square().sum() / below.sum()) < high


def test_bootstrap_subsets_take_whole_samples_once():
    subsets = bootstrap_subsets(samples=10, rows_per_sample=3, resamples=50, seed=0)
    assert subsets.shape == (30, 51) and subsets[:, 0].all()
    assert set(subsets.flatten().tolist()) == {0.0, 1.0}
    by_sample = subsets.reshape(10, 3, 51)
    assert torch.equal(by_sample.amin(1), by_sample.amax(1))
    assert 0.55 < float(by_sample[:, 0, 1:].mean()) < 0.75  # a draw hits 1 - (1 - 1/10)^10 = 65 %
    assert torch.equal(subsets, bootstrap_subsets(10, 3, 50, seed=0))


@pytest.mark.parametrize(
    ("right", "count", "expected"), [(1000, 1000, (0.99617, 1.0)), (0, 50, (0.0, 0.07135)), (81, 263, (0.2553, 0.3662))]
)
def test_wilson_interval_against_published_values(right, count, expected):
    """81 of 263: Newcombe 1998, table I, method 3."""
    values = torch.arange(count) < right
    assert wilson_interval(values) == pytest.approx(expected, abs=1e-4)
