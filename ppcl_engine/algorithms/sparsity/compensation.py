"""The remaining weights compensate for the dropped ones.

Optimal brain surgeon (`compensated`; SparseGPT, Frantar and Alistarh 2023, arXiv 2301.00774; for
diffusion models, with inputs weighted by timestep: OBS-Diff, arXiv 2510.06751). Goes through the
columns from left to right; weights to the left of a column are final, so one factor of the inverse
serves all rows.

Refit (`refitted`): the best weights for a given mask, by least squares with conjugate gradients,
all rows at once, never worse than the start. SparseGPT goes from left to right, so columns on the
right compensate for all others and for their own errors alone; with a given mask the exact minimum
can be reached (Boža 2024, arXiv 2401.02938, solves it by ADMM).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

BLOCK = 128  # columns that are updated before the ones behind them: the paper's
DAMPING = 0.01  # as much as in the paper, of each column's own diagonal

Choose = Callable[[int, torch.Tensor], torch.Tensor]
"""(first column, scores [rows, some columns]) -> which weights stay, bool of the same shape"""
MOST_STEPS = 32
ENOUGH = 1e-4  # of the first residual, squared


def ridge_of(gram: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """[columns]: `damping` times each column's own diagonal.

    The paper uses the mean diagonal, but then one input 1,000 times as large as the others would
    drown what they say. Columns that are always zero get the mean.
    """
    diagonal = gram.diagonal()
    return damping * torch.where(diagonal > 0, diagonal, diagonal.mean())


def inverse_factor(gram: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """U upper triangular, H^-1 = U^T U, H = G + `ridge_of` G.

    Row j of U / U_jj is what column j passes on to the columns after it, and U_jj^2 is [H^-1]_jj
    once the columns before j are final.
    """
    regular = gram.double() + torch.diag(ridge_of(gram, damping).double())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular))
    return torch.linalg.cholesky(inverse, upper=True)


def inverse_diagonal(gram: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """diag(H^-1), before any column is final"""
    return inverse_factor(gram, damping).square().sum(0)


def compensated(
    weight: torch.Tensor,
    gram: torch.Tensor,
    choose: Choose,
    step: int = BLOCK,
    damping: float = DAMPING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(new weight, which weights stay).

    `choose` is called for every `step` columns, with the scores W_ij^2 / [H^-1]_jj after all
    updates so far. step: at most BLOCK, and a divisor of it.
    """
    factor, new = inverse_factor(gram, damping), weight.double().clone()
    stays = torch.ones_like(weight, dtype=torch.bool)
    for first in range(0, weight.shape[1], BLOCK):
        columns = slice(first, min(first + BLOCK, weight.shape[1]))
        errors = _settle(
            new[:, columns], stays[:, columns], factor[columns, columns], choose, step, first
        )
        new[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return new.to(weight.dtype), stays


def _settle(
    part: torch.Tensor,
    stays: torch.Tensor,
    factor: torch.Tensor,
    choose: Choose,
    step: int,
    first: int,
) -> torch.Tensor:
    """Makes the columns of a block final, in place; returns each dropped weight / U_jj, for the
    columns after the block."""
    errors, diagonal = torch.zeros_like(part), factor.diagonal()
    for j in range(part.shape[1]):
        if j % step == 0:
            some = slice(j, min(j + step, part.shape[1]))
            stays[:, some] = choose(first + j, part[:, some].square() / diagonal[some].square())
        errors[:, j] = part[:, j].masked_fill(stays[:, j], 0) / diagonal[j]
        part[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
        part[:, j].masked_fill_(~stays[:, j], 0)
    return errors


def refitted(
    weight: torch.Tensor, gram: torch.Tensor, stays: torch.Tensor, damping: float = DAMPING
) -> torch.Tensor:
    """The W' that minimises tr((W - W') H (W - W')^T), zero where no weight stays; H = G +
    `ridge_of` G.

    The ridge keeps weights near their old values where the calibration inputs say nothing.
    Preconditioned by the diagonal of H.
    """
    ridge = ridge_of(gram, damping)
    diagonal = gram.diagonal() + ridge

    def masked_product(x: torch.Tensor) -> torch.Tensor:
        return (x @ gram + ridge * x).masked_fill(~stays, 0)

    new = weight.masked_fill(~stays, 0)
    residual = masked_product(weight - new)
    scaled = residual / diagonal
    direction, power = scaled, (residual * scaled).sum(1)
    start = power.clone()
    for _ in range(MOST_STEPS):
        if bool((power <= ENOUGH * start).all()):
            break
        product = masked_product(direction)
        step = power / (direction * product).sum(1).clamp_min(torch.finfo(power.dtype).tiny)
        new, residual = new + step[:, None] * direction, residual - step[:, None] * product
        scaled = residual / diagonal
        before, power = power, (residual * scaled).sum(1)
        direction = (
            scaled + (power / before.clamp_min(torch.finfo(power.dtype).tiny))[:, None] * direction
        )
    return new
