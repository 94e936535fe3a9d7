"""Centred kernel alignment: short pure functions in float64."""

from __future__ import annotations

from collections.abc import Callable

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


def biased_hsic(
    k: torch.Tensor,
    l: torch.Tensor,  # noqa: E741
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """tr(K H L H) / (n - 1)^2, H centring the chosen rows (Gretton et al. 2005, equation 9): most
    papers' form."""
    w = torch.ones(len(k), 1, dtype=k.dtype, device=k.device) if chosen is None else chosen.to(k)
    n = w.sum(0)
    k_rows, l_rows = w * (k @ w), w * (l @ w)
    trace = (w * ((k * l) @ w)).sum(0)
    return (trace - 2 * (k_rows * l_rows).sum(0) / n + k_rows.sum(0) * l_rows.sum(0) / n**2) / (
        n - 1
    ) ** 2


def cka(
    k: torch.Tensor,
    l: torch.Tensor,  # noqa: E741
    chosen: torch.Tensor | None = None,
    estimator: Callable[..., torch.Tensor] = hsic,
) -> torch.Tensor:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) (Kornblith et al. 2019, equation 3); one value for
    each subset."""
    return estimator(k, l, chosen) / (estimator(k, k, chosen) * estimator(l, l, chosen)).sqrt()
