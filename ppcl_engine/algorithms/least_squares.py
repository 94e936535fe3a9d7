"""Ridge regression from sums over rows, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..architectures.modules import AnyModule
from ..system.finite import check_finite
from ..system.json_text import finite_or_none

NOT_FITTED = "the model's weights or the calibration set are damaged: download the model again, run calibrate again"
# in settings, so that what was fitted with another ridge is fitted again
RIDGE, RIDGE_OF = 1e-4, "each channel's variance"
"""the share of it that the least-squares maps of all stages add, unless a setting says otherwise"""
# of its second moment: a channel that varies less counts as one that does not vary
CONSTANT = 1e-12


class InputMoments:
    """X^T X [width + 1, width + 1] of all rows, X followed by a column of ones, in float64: memory
    does not grow with the set.

    Several `NormalEquations` that read the same rows of X may share one.
    """

    def __init__(self, width: int, device: str = "cpu"):
        self.width = width
        self.xx = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        self._factors: dict[float, torch.Tensor] = {}

    @property
    def rows(self) -> int:
        return int(self.xx[-1, -1])

    def add(self, x: torch.Tensor) -> None:
        """x [rows, width]"""
        x = with_ones(x)
        self.xx += x.T @ x
        self._factors.clear()

    @property
    def mean(self) -> torch.Tensor:
        return self.xx[-1, :-1] / self.xx[-1, -1].clamp_min(1)

    @property
    def deviation(self) -> torch.Tensor:
        """Standard deviation of every channel, [width]; 0 for those that do not vary."""
        moment = self.xx.diagonal()[:-1]
        varied = moment - self.xx[-1, -1] * self.mean.square()
        return (
            torch.where(varied > CONSTANT * moment, varied / self.xx[-1, -1].clamp_min(1), 0.0)
            .clamp_min(0)
            .sqrt()
        )

    def factor(self, ridge: float) -> torch.Tensor:
        """Cholesky factor of Z^T Z + ridge * rows * I, where Z is X with every channel at mean 0
        and deviation 1.

        A channel that does not vary is left out: 1 on the diagonal, 0 beside it. Raises ValueError
        where Z^T Z is singular and there is no ridge.
        """
        if ridge not in self._factors:
            scale, mean = self.deviation, self.mean
            z = torch.where(scale > 0, 1 / scale, 0.0)
            gram = (self.xx[:-1, :-1] - self.xx[-1, -1] * torch.outer(mean, mean)) * torch.outer(
                z, z
            )
            gram.diagonal().add_(torch.where(scale > 0, ridge * self.xx[-1, -1], 1.0))
            factor, failed = torch.linalg.cholesky_ex(gram)
            if failed:
                raise ValueError(
                    f"{self.rows} rows do not determine a map of {self.width} channels without a ridge; use a ridge above 0, "
                    "or calibrate with more samples"
                )
            self._factors = {ridge: factor}
        return self._factors[ridge]

    def rank(self) -> int:
        """Numerical rank of X, its channels scaled to the same length.

        A Cholesky factor proves full rank at a fraction of the cost of eigenvalues, which decide
        where it does not.
        """
        length = self.xx.diagonal()[:-1].sqrt()
        scaled = self.xx[:-1, :-1] / torch.where(length > 0, length, 1.0).outer(
            torch.where(length > 0, length, 1.0)
        )
        tolerance = self.width * torch.finfo(torch.float64).eps
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if not failed:
            least = (
                1 / torch.cholesky_inverse(factor).diagonal().sum()
            )  # no eigenvalue is smaller, none above the width
            if least > tolerance * self.width:
                return self.width
        eigenvalues = torch.linalg.eigvalsh(scaled)
        return int((eigenvalues > eigenvalues[-1] * tolerance).sum())


def with_ones(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


class NormalEquations:
    """Least squares Y ~ X W + b from X^T X and X^T Y, accumulated over batches in float64."""

    def __init__(
        self, width_in: int, width_out: int, device: str = "cpu", inputs: InputMoments | None = None
    ):
        """inputs: for the same rows of X, filled by their owner."""
        options = {"dtype": torch.float64, "device": device}
        self.inputs = InputMoments(width_in, device) if inputs is None else inputs
        self._fills_inputs = inputs is None
        self.xy = torch.zeros(width_in + 1, width_out, **options)
        self.yy = torch.zeros(width_out, **options)

    @property
    def rows(self) -> int:
        return self.inputs.rows

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x [rows, width_in], y [rows, width_out]"""
        if self._fills_inputs:
            self.inputs.add(x)
        y = y.double()
        self.xy += with_ones(x).T @ y
        self.yy += y.square().sum(0)

    def shared(self, whole: Callable[[torch.Tensor], torch.Tensor]) -> NormalEquations:
        """The equations for all rows, where `whole` sums over the processes that have them; shared
        inputs are summed by their owner."""
        if self._fills_inputs:
            self.inputs.xx = whole(self.inputs.xx)
        self.xy, self.yy = whole(self.xy), whole(self.yy)
        return self

    def solve(self, ridge: float, rank: bool = False) -> Solution:
        """Minimum of ||X W - Y||^2 + ridge * sum over channels of (the channel's variation) * (its
        row of W)^2.

        Each channel is shrunk by its own size, as if all had first been scaled to one variance: a
        ridge of the channels' mean would suppress every map of small channels beside a large one.
        The bias is not shrunk. rank: whether to compute it. Raises ValueError for states that are
        not finite.
        """
        check_finite(
            {"sum": self.inputs.xx, "product": self.xy}, "what a map is fitted to", NOT_FITTED
        )
        count, scale = self.inputs.xx[-1, -1].clamp_min(1), self.inputs.deviation
        y_sum = self.xy[-1]
        z = torch.where(scale > 0, 1 / scale, 0.0)
        centred = (self.xy[:-1] - torch.outer(self.inputs.mean, y_sum)) * z[:, None]
        solution = torch.cholesky_solve(centred, self.inputs.factor(ridge))
        spread = self.yy - y_sum.square() / count
        error = spread - (solution * centred).sum(0) - ridge * count * solution.square().sum(0)
        varies = spread > CONSTANT * self.yy
        weight = (solution * z[:, None]).T.contiguous()
        return Solution(
            weight=weight,
            bias=y_sum / count - weight @ self.inputs.mean,
            residual=float(error.sum() / spread.sum()),
            channels=(error / spread)[varies],
            rank=self.inputs.rank() if rank else None,
            rows=self.rows,
        )


@dataclass(frozen=True, kw_only=True)
class Solution:
    """An affine map, and how well it fits."""

    weight: torch.Tensor
    """[out, in]"""
    bias: torch.Tensor
    """[out]"""
    residual: float
    """error / variance of Y"""
    channels: torch.Tensor
    """the same for every channel of Y that varies"""
    rank: int | None
    """numerical rank of X, where it was asked for"""
    rows: int
    """rows that it was fitted to"""

    @property
    def report(self) -> dict[str, float | None]:
        """The error of the whole (None where Y does not vary) and of single channels: a few large
        channels may dominate the whole."""
        worst = float(self.channels.max()) if len(self.channels) else 0.0
        median = float(self.channels.median()) if len(self.channels) else 0.0
        return {"residual": finite_or_none(self.residual), "median": median, "worst": worst}


def fit_map(target: AnyModule, equations: NormalEquations) -> Solution:
    """Writes the ridge solution into a Linear, or into a pair of Linears its best approximation of
    their rank.

    Reduced-rank regression: project on the leading directions of the fitted values, centred
    (Izenman 1975).
    """
    solution = equations.solve(RIDGE)
    if isinstance(target, nn.Linear):
        target.weight.copy_(solution.weight)
        target.bias.copy_(solution.bias)
        return solution
    down, up = target
    inputs, mean = equations.inputs, equations.inputs.mean
    centred = inputs.xx[:-1, :-1] - inputs.rows * torch.outer(mean, mean)
    leading = torch.linalg.eigh(solution.weight @ centred @ solution.weight.T).eigenvectors[
        :, -down.out_features :
    ]
    down.weight.copy_(leading.T @ solution.weight)
    up.weight.copy_(leading)
    up.bias.copy_(solution.bias + (solution.weight - leading @ leading.T @ solution.weight) @ mean)
    return solution
