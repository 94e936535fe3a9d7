"""Ridge regression from sums over batches against torch's least squares."""

import math

import pytest
import torch

from ppcl_engine.algorithms.least_squares import InputMoments, NormalEquations, fit_map

from ..tiny.tensors import normal


def equations_of(x: torch.Tensor, y: torch.Tensor, parts: int = 1) -> NormalEquations:
    equations = NormalEquations(x.shape[1], y.shape[1])
    for rows in torch.arange(len(x)).chunk(parts):
        equations.add(x[rows], y[rows])
    return equations


def test_normal_equations_equal_lstsq():
    x, y = normal(50, 5) + 3, normal(50, 4, seed=1)
    solution = equations_of(x, y).solve(ridge=0.0, rank=True)
    direct = torch.linalg.lstsq(torch.cat([x, torch.ones(50, 1)], 1), y).solution
    torch.testing.assert_close(solution.weight, direct[:-1].T)
    torch.testing.assert_close(solution.bias, direct[-1])
    error = (x @ solution.weight.T + solution.bias - y).square().sum()
    assert solution.residual == pytest.approx(
        float(error / (y - y.mean(0)).square().sum()), rel=1e-8
    )
    assert (solution.rank, solution.rows) == (5, 50)


def test_an_affine_map_is_found_whole():
    x, weight, bias = normal(30, 4) * 5 - 2, normal(3, 4, seed=1), normal(3, seed=2)
    solution = equations_of(x, x @ weight.T + bias).solve(ridge=0.0)
    torch.testing.assert_close(solution.weight, weight)
    torch.testing.assert_close(solution.bias, bias)
    assert abs(solution.residual) < 1e-10


def test_ridge_is_a_share_of_each_channels_variance_and_spares_the_bias():
    """W shrinks as (Xc^T Xc + penalty)^-1 Xc^T Yc, Xc and Yc being centred; the bias makes the
    means agree."""
    sizes = torch.tensor([1.0, 3.0, 0.1, 50.0], dtype=torch.float64)
    x, y = normal(30, 4) * sizes + 7, normal(30, 2, seed=1) + 100
    centred = x - x.mean(0)
    penalty = torch.diag(0.3 * centred.square().sum(0))
    direct = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (y - y.mean(0))).T
    solution = equations_of(x, y).solve(ridge=0.3)
    torch.testing.assert_close(solution.weight, direct)
    torch.testing.assert_close(solution.bias, y.mean(0) - direct @ x.mean(0))
    errors = (x @ solution.weight.T + solution.bias - y).square().sum(0) / (
        y - y.mean(0)
    ).square().sum(0)
    torch.testing.assert_close(solution.channels, errors)
    assert solution.report["worst"] == pytest.approx(float(errors.max()))


@pytest.mark.parametrize("size", [1e3, 1e4, 2e7])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_one_large_channel_does_not_shut_out_the_others(size, offset):
    """Channel 3 is `size` times as large as the others, and away from zero by `offset` times
    that."""
    x, weight = normal(400, 12), normal(5, 12, seed=1)
    x[:, 3] = size * (x[:, 3] + offset)
    weight[:, 3] /= size
    solution = equations_of(x, x @ weight.T).solve(1e-4)
    others = [channel for channel in range(12) if channel != 3]
    torch.testing.assert_close(solution.weight[:, others], weight[:, others], rtol=2e-3, atol=2e-3)
    assert solution.report["worst"] < 1e-6


def test_a_poor_fit_of_one_channel_is_seen_beside_a_large_one():
    x = normal(400, 6)
    y = x.clone()
    y[:, 0], y[:, 1] = 1e4 * x[:, 0], normal(400, seed=1)
    report = equations_of(x, y).solve(1e-4).report
    assert report["residual"] < 1e-6 and report["median"] < 1e-6 and report["worst"] > 0.9


def test_channels_that_never_vary_are_left_to_the_bias():
    x, y = normal(40, 5), normal(40, 3, seed=1)
    x[:, 1], x[:, 2], y[:, 2] = 7.0, 0.0, 4.0
    solution = equations_of(x, y).solve(1e-4)
    assert not solution.weight[:, 1:3].any() and not solution.weight[2].abs().gt(1e-12).any()
    assert solution.bias[2] == pytest.approx(4.0) and len(solution.channels) == 2
    assert all(math.isfinite(value) for value in solution.report.values())


def test_what_no_ridge_can_settle_is_refused():
    with pytest.raises(
        ValueError,
        match="4 rows do not determine a map of 8 channels without a ridge; use a ridge above 0",
    ):
        equations_of(normal(4, 8), normal(4, 2)).solve(0.0)


def test_inputs_are_built_once_for_several_fits():
    x, targets = normal(50, 6), [normal(50, 3, seed=seed) for seed in (1, 2)]
    inputs = InputMoments(6)
    inputs.add(x)
    for y in targets:
        equations = NormalEquations(6, 3, inputs=inputs)
        equations.add(x, y)
        ours, theirs = equations.solve(1e-4), equations_of(x, y).solve(1e-4)
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    assert inputs.rows == 50


def test_the_eigenvalues_are_asked_only_where_the_rank_is_in_doubt(monkeypatch):
    asked, eigvalsh = [], torch.linalg.eigvalsh
    monkeypatch.setattr(
        torch.linalg, "eigvalsh", lambda matrix: asked.append(1) or eigvalsh(matrix)
    )
    full = equations_of(
        normal(50, 6) * torch.tensor([1, 1, 1e7, 1, 1e-3, 1]), normal(50, 2, seed=1)
    )
    assert full.solve(1e-4).rank is None and full.solve(1e-4, rank=True).rank == 6 and not asked
    assert (
        equations_of(normal(50, 3) @ normal(3, 6, seed=1), normal(50, 2))
        .solve(1e-4, rank=True)
        .rank
        == 3
        and asked
    )


def test_batches_add_up():
    x, y = normal(60, 5).float(), normal(60, 3, seed=1).float()
    whole, parts = equations_of(x, y).solve(1e-4), equations_of(x, y, parts=7).solve(1e-4)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=1e-10, atol=1e-12)
    assert (parts.rows, parts.residual) == (60, pytest.approx(whole.residual))


def test_missing_rank_is_reported_and_harmless():
    x = normal(50, 3) @ normal(3, 8, seed=1)
    y = x @ normal(8, 2, seed=2)
    solution = equations_of(x, y).solve(1e-8, rank=True)
    assert solution.rank == 3
    torch.testing.assert_close(x @ solution.weight.T + solution.bias, y, rtol=1e-4, atol=1e-4)
    assert equations_of(normal(4, 8), normal(4, 2)).solve(1e-4, rank=True).rank == 4


def regression(seed: int = 0):
    """Correlated rows far from zero, and targets that no map of low rank reaches."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 8, generator=generator) @ torch.randn(
        8, 8, generator=generator
    ) + 20 * torch.randn(8, generator=generator)
    y = x @ torch.randn(8, 8, generator=generator) + torch.randn(200, 8, generator=generator) - 5
    equations = NormalEquations(8, 8)
    equations.add(x, y)
    return x.double(), y.double(), equations


def squared_error(linear: torch.nn.Module, x, y) -> float:
    return float((linear.double()(x) - y).square().sum())


@torch.no_grad()
def test_a_full_map_is_the_ridge_solution():
    x, y, equations = regression()
    linear = torch.nn.Linear(8, 8)
    fit_map(linear, equations)
    torch.testing.assert_close(
        linear.weight.double(), equations.solve(1e-4).weight, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        linear.bias.double(), equations.solve(1e-4).bias, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_low_rank_map_is_the_best_of_its_rank(rank, monkeypatch):
    """Whitened and centred, the best map keeps the largest singular values (Eckart and Young)."""
    x, y, equations = regression()
    whitening = torch.linalg.svd(x - x.mean(0), full_matrices=False).U
    target = y - y.mean(0)
    values = torch.linalg.svdvals(whitening.T @ target)
    best = float(target.square().sum() - values[:rank].square().sum())
    maps = torch.nn.Sequential(torch.nn.Linear(8, rank, bias=False), torch.nn.Linear(rank, 8))
    monkeypatch.setattr("ppcl_engine.algorithms.least_squares.RIDGE", 1e-12)
    fit_map(maps, equations)
    assert squared_error(maps, x, y) == pytest.approx(best, rel=1e-3)
