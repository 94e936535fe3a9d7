"""Intervals of a mean, a ratio, a share and a benchmark's score: bootstrap and Wilson."""

from __future__ import annotations

import torch


def bootstrap_interval(
    values: torch.Tensor, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [n] (Efron 1979)."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values.double()[choice].mean(1)
    low, high = torch.quantile(
        means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    )
    return float(low), float(high)


def wilson_interval(right: torch.Tensor) -> tuple[float, float]:
    """95 % interval of the share of true values in `right`, bool [n] (Wilson 1927). The bootstrap's
    interval would have no width at 0 and 100 %."""
    count, share, z = len(right), float(right.double().mean()), 1.959964
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_ratio(
    above: torch.Tensor, below: torch.Tensor, seed: int, resamples: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of sum(above) / sum(below), both [n], resampled together."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(above), (resamples, len(above)), generator=generator)
    ratios = above.double()[choice].sum(1) / below.double()[choice].sum(1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def resampled_scores(
    earned: torch.Tensor,
    possible: torch.Tensor,
    categories: torch.Tensor,
    seed: int,
    resamples: int = 1000,
) -> torch.Tensor:
    """[rows, 1 + resamples]: the mean over categories of sum(earned) / sum(possible). First of all
    samples, then of samples drawn anew within each category, the same for all rows, so that
    differences of rows are paired. earned: [rows, n]; possible, categories: [n]."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.zeros(len(earned), 1 + resamples, dtype=torch.float64)
    groups = [torch.nonzero(categories == c)[:, 0] for c in categories.unique()]
    for group in groups:
        choice = torch.randint(len(group), (resamples, len(group)), generator=generator)
        counts = torch.ones(1 + resamples, len(group), dtype=torch.float64)
        counts[1:] = torch.zeros_like(counts[1:]).scatter_add_(1, choice, counts[1:])
        scores += (earned[:, group].double() @ counts.T) / (possible[group].double() @ counts.T)
    return scores / len(groups)


def spread_estimate(values: torch.Tensor) -> dict[str, float]:
    """value, low, high: the first of `values` [1 + resamples], and the 95 % percentile interval of
    the others."""
    low, high = torch.quantile(values[1:], torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def drawn_tokens(real: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of `count` real tokens of each sample, drawn at random: [n, count]; fewer where a
    sample has fewer. real: bool [n, tokens]."""
    order = torch.rand(real.shape, generator=generator).masked_fill(~real.cpu(), 2.0).argsort(1)
    return order[:, : min(count, int(real.sum(1).min()))]


def squares(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each sample [n], float64, of x [n, ...]."""
    return x.double().square().flatten(1).sum(1)


def mean_estimate(values: torch.Tensor, seed: int) -> dict[str, float]:
    """The mean of `values` [n] with its 95 % bootstrap interval: value, low, high."""
    low, high = bootstrap_interval(values, seed)
    return {"value": float(values.double().mean()), "low": low, "high": high}


def ratio_estimate(above: torch.Tensor, below: torch.Tensor, seed: int) -> dict[str, float]:
    """sum(above) / sum(below), both [n], with its 95 % bootstrap interval: value, low, high."""
    low, high = bootstrap_ratio(above, below, seed)
    return {"value": float(above.sum() / below.sum()), "low": low, "high": high}


def share_estimate(right: torch.Tensor) -> dict[str, float]:
    """The share of true values in `right`, bool [n], with its 95 % Wilson interval: value, low,
    high."""
    low, high = wilson_interval(right)
    return {"value": float(right.double().mean()), "low": low, "high": high}


def bootstrap_subsets(
    samples: int, rows_per_sample: int, resamples: int, seed: int
) -> torch.Tensor:
    """[samples * rows_per_sample, resamples + 1] zeros and ones; the first column selects all rows.

    The others select the samples that a draw with replacement contains, each once: a row that
    occurs twice in a Gram matrix would look like perfect alignment.
    """
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(samples, (resamples, samples), generator=generator)
    hit = torch.zeros(resamples + 1, samples, dtype=torch.float64)
    hit[0] = 1
    hit[1:].scatter_(1, choice, 1.0)
    return hit.repeat_interleave(rows_per_sample, dim=1).T.contiguous()
