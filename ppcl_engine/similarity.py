"""Centred kernel alignment, ridge regression and their resampling: short pure functions in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


def hsic(k: torch.Tensor, l: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:  # noqa: E741
    """Debiased Hilbert-Schmidt independence criterion of two Gram matrices [n, n], n > 3.

    Song et al. 2012, "Feature selection via dependence maximization", equation 5. `chosen` [n, r]
    of zeros and ones gives one value for each of r subsets of the rows, in one pass.
    """
    k, l = (m - torch.diag(m.diagonal()) for m in (k, l))  # noqa: E741
    w = torch.ones(len(k), 1, dtype=k.dtype, device=k.device) if chosen is None else chosen.to(k)
    n = w.sum(0)
    k_rows, l_rows = w * (k @ w), w * (l @ w)
    trace = (w * ((k * l) @ w)).sum(0)
    means = k_rows.sum(0) * l_rows.sum(0) / ((n - 1) * (n - 2))
    cross = 2 * (k_rows * l_rows).sum(0) / (n - 2)
    return (trace + means - cross) / (n * (n - 3))


def linear_gram(x: torch.Tensor) -> torch.Tensor:
    """x [n, d] -> centred Gram matrix [n, n], float64."""
    x = x.double()
    x = x - x.mean(0)
    return x @ x.T


def rbf_gram(x: torch.Tensor) -> torch.Tensor:
    """Gaussian kernel [n, n], its width the median distance (Kornblith et al. 2019, section 4)."""
    squared = torch.cdist(x.double(), x.double()).square()
    off_diagonal = squared[~torch.eye(len(x), dtype=torch.bool, device=x.device)]
    return torch.exp(-squared / (2 * off_diagonal.median()))


def biased_hsic(k: torch.Tensor, l: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:  # noqa: E741
    """tr(K H L H) / (n - 1)^2, H centring the chosen rows (Gretton et al. 2005, equation 9): most papers' form."""
    w = torch.ones(len(k), 1, dtype=k.dtype, device=k.device) if chosen is None else chosen.to(k)
    n = w.sum(0)
    k_rows, l_rows = w * (k @ w), w * (l @ w)
    trace = (w * ((k * l) @ w)).sum(0)
    return (trace - 2 * (k_rows * l_rows).sum(0) / n + k_rows.sum(0) * l_rows.sum(0) / n**2) / (n - 1) ** 2


def cka(
    k: torch.Tensor,
    l: torch.Tensor,  # noqa: E741
    chosen: torch.Tensor | None = None,
    estimator: Callable[..., torch.Tensor] = hsic,
) -> torch.Tensor:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) (Kornblith et al. 2019, equation 3); one value a subset."""
    return estimator(k, l, chosen) / (estimator(k, k, chosen) * estimator(l, l, chosen)).sqrt()


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
        self.xx, self.xy, self.yy, self.y_sum = (whole(sums) for sums in (self.xx, self.xy, self.yy, self.y_sum))
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
        rank = int((eigenvalues > eigenvalues[-1] * self.width_in * torch.finfo(torch.float64).eps).sum())
        spread = self.yy - self.y_sum.square().sum() / max(1, self.rows)
        error = self.yy - 2 * (solution * self.xy).sum() + (solution * (self.xx @ solution)).sum()
        return Solution(solution[:-1].T.contiguous(), solution[-1], float(error / spread), rank, self.rows)


@dataclass(frozen=True)
class Solution:
    """weight [out, in], bias [out]; residual: error / variance of Y; rank: numerical, of X^T X."""

    weight: torch.Tensor
    bias: torch.Tensor
    residual: float
    rank: int
    rows: int


def bootstrap_interval(
    values: torch.Tensor, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [n] (Efron 1979)."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values.double()[choice].mean(1)
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(low), float(high)


def wilson_interval(right: torch.Tensor) -> tuple[float, float]:
    """95 % interval of a share of trues in `right`, bool [n] (Wilson 1927). The bootstrap's has no width at 0 and 100 %."""
    count, share, z = len(right), float(right.double().mean()), 1.959964
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_ratio(above: torch.Tensor, below: torch.Tensor, seed: int, resamples: int = 1000) -> tuple[float, float]:
    """95 % percentile interval of sum(above) / sum(below), both [n], resampled together."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(above), (resamples, len(above)), generator=generator)
    ratios = above.double()[choice].sum(1) / below.double()[choice].sum(1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def bootstrap_subsets(samples: int, rows_per_sample: int, resamples: int, seed: int) -> torch.Tensor:
    """[samples * rows_per_sample, resamples + 1] zeros and ones; the first column takes all.

    The others hold the samples that a draw with replacement hits, each once: a row that stands
    twice in a Gram matrix would look like perfect alignment.
    """
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(samples, (resamples, samples), generator=generator)
    hit = torch.zeros(resamples + 1, samples, dtype=torch.float64)
    hit[0] = 1
    hit[1:].scatter_(1, choice, 1.0)
    return hit.repeat_interleave(rows_per_sample, dim=1).T.contiguous()
