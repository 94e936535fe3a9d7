"""Ridge regression from sums over rows, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class NormalEquations:
    """X^T X and X^T Y accumulated over batches in float64, so memory does not grow with the set.

    A column of ones is appended to X; the solution's last row is the bias.
    """

    width_in: int
    width_out: int
    device: str = "cpu"

    def __post_init__(self):
        options = {"dtype": torch.float64, "device": self.device}
        self.xx = torch.zeros(self.width_in + 1, self.width_in + 1, **options)
        self.xy = torch.zeros(self.width_in + 1, self.width_out, **options)
        self.yy = torch.zeros((), **options)
        self.y_sum = torch.zeros(self.width_out, **options)
        self.rows = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x [rows, width_in], y [rows, width_out]"""
        x, y = x.double(), y.double()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum()
        self.y_sum += y.sum(0)
        self.rows += len(x)

    def shared(self, whole: Callable[[torch.Tensor], torch.Tensor]) -> NormalEquations:
        """Those of all rows, where `whole` sums over the processes that have them."""
        self.xx, self.xy, self.yy, self.y_sum = (
            whole(sums) for sums in (self.xx, self.xy, self.yy, self.y_sum)
        )
        self.rows = int(whole(torch.tensor(self.rows)))
        return self

    def solve(self, ridge: float) -> Solution:
        """Minimum of ||X W - Y||^2 + ridge * mean diagonal * ||W||^2; the bias is not shrunk."""
        diagonal = self.xx.diagonal()[:-1]
        penalty = torch.full_like(self.xx.diagonal(), ridge * float(diagonal.mean()))
        penalty[-1] = 0
        regular = self.xx + torch.diag(penalty)
        solution = torch.linalg.solve(regular, self.xy)
        eigenvalues = torch.linalg.eigvalsh(self.xx[:-1, :-1])
        rank = int(
            (eigenvalues > eigenvalues[-1] * self.width_in * torch.finfo(torch.float64).eps).sum()
        )
        spread = self.yy - self.y_sum.square().sum() / max(1, self.rows)
        error = self.yy - 2 * (solution * self.xy).sum() + (solution * (self.xx @ solution)).sum()
        return Solution(
            solution[:-1].T.contiguous(), solution[-1], float(error / spread), rank, self.rows
        )


@dataclass(frozen=True)
class Solution:
    """weight [out, in], bias [out]; residual: error / variance of Y; rank: numerical, of X^T X."""

    weight: torch.Tensor
    bias: torch.Tensor
    residual: float
    rank: int
    rows: int
