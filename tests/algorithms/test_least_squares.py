"""Ridge regression from sums over batches against torch's least squares."""

import pytest
import torch

from ppcl_engine.algorithms.least_squares import NormalEquations

from .detection.test_alignment import normal


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
