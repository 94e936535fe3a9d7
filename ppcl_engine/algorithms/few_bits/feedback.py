"""Weights that make up for each other's rounding, without training.

GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded from left to right, and the columns
that are still to come take over the error that least squares on the layer's inputs leaves them, by the
Cholesky factor of the inverse Gram matrix. Columns that share a scale are rounded at once, since their
scale is made of all of them: blocks of 16 or 32 columns instead of GPTQ's single ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def fed_back(
    weight: torch.Tensor,
    factor: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor],
    columns: int,
) -> torch.Tensor:
    """The rounded weight [rows, all columns], float64.

    factor: U upper triangular, H^-1 = U^T U (`sparsity.compensation.inverse_factor`). rounded: what some
    neighbouring columns are stored as, whatever the others are. columns: how many share a scale. With E
    the error of block b, the columns behind it become W - E U_bb^-1 U_b.
    """
    new = weight.double().clone()
    for first in range(0, new.shape[1], columns):
        block, behind = slice(first, first + columns), slice(first + columns, None)
        kept = rounded(new[:, block]).double()
        errors = torch.linalg.solve_triangular(
            factor[block, block], new[:, block] - kept, upper=True, left=False
        )
        new[:, block] = kept
        new[:, behind] -= errors @ factor[block, behind]
    return new
