"""Several seeds of every row: the teacher stays, calibration, training and drawing vary. Means, their
intervals, and paired differences from a reference row, by a bootstrap over seeds and captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ppcl_engine.algorithms.resampling import spread_estimate
from ppcl_engine.system.tensor_files import TensorFile

from ..shared.scoring import READINGS, RESAMPLES, SEED

REFERENCE = "ours"
MEANS = (
    "parameters",
    "image_distance",
    "mean_of_singles",
    "mean_of_subsets",
    "learning_rate",
    "seconds",
)
"""what becomes its mean over seeds, beside the accuracies"""

Readings = tuple[torch.Tensor, torch.Tensor]
"""of one seed: a row's and the teacher's [readings, captions], zeros and ones"""


def read_readings(row: Path, teacher: Path) -> Readings:
    """The files that scoring leaves. Raises ValueError where there are none."""
    ours, theirs = (TensorFile(path) for path in (row, teacher))
    return tuple(
        torch.stack([file.read(name) for name in READINGS]).double() for file in (ours, theirs)
    )


def resampled_drops(seeds: Sequence[Readings]) -> torch.Tensor:
    """[1 + RESAMPLES]: the mean over seeds of 100 (1 - mean of the student / teacher ratios of the
    readings). First as it is, then of seeds drawn with replacement, and in each of them of captions
    drawn with replacement. The draws are the same for all rows, so that differences are paired."""
    generator = torch.Generator().manual_seed(SEED)
    count = len(seeds)
    drops = torch.zeros(1 + RESAMPLES, dtype=torch.float64)
    drops[0] = torch.stack([_drops(readings, None)[0] for readings in seeds]).mean()
    for _ in range(count):
        chosen = torch.randint(count, (RESAMPLES,), generator=generator)
        for number, readings in enumerate(seeds):
            captions = readings[0].shape[1]
            choice = torch.randint(captions, (RESAMPLES, captions), generator=generator)
            drops[1:] += (chosen == number) * _drops(readings, choice) / count
    return drops


def _drops(readings: Readings, choice: torch.Tensor | None) -> torch.Tensor:
    """[resamples] of the captions that `choice` [resamples, captions] has; [1] of all of them."""
    ours, teacher = readings
    captions = ours.shape[1]
    counts = torch.ones(1, captions, dtype=torch.float64)
    if choice is not None:
        counts = torch.zeros(choice.shape, dtype=torch.float64)
        counts.scatter_add_(1, choice, torch.ones_like(counts))
    # a resample in which the teacher reads nothing right would have no ratio
    right, possible = ours @ counts.T, (teacher @ counts.T).clamp(min=1)
    return 100 * (1 - (right / possible).mean(0))


def combined(rows: Sequence[dict], drops: torch.Tensor, reference: torch.Tensor | None) -> dict:
    """One row of the table from the same row of every seed. drops, reference: `resampled_drops` of the
    row, and of the row that it is compared with."""
    first, estimate = rows[0], spread_estimate(drops)
    accuracies = [f"{name}_accuracy" for name in READINGS]
    means = [name for name in (*MEANS, *accuracies) if first.get(name) is not None]
    return {
        **first,
        **{name: _mean([row[name] for row in rows]) for name in means},
        "drop_percent": estimate["value"],
        "low": estimate["low"],
        "high": estimate["high"],
        "velocity_error": {"value": _mean([row["velocity_error"]["value"] for row in rows])},
        "seeds": [row["drop_percent"] for row in rows],
        "difference": _difference(drops, reference),
    }


def _difference(drops: torch.Tensor, reference: torch.Tensor | None) -> dict | None:
    """Drop minus the reference's. "better" or "worse" only where the interval leaves 0 out."""
    if reference is None:
        return None
    estimate = spread_estimate(drops - reference)
    verdict = (
        "worse" if estimate["low"] > 0 else "better" if estimate["high"] < 0 else "not told apart"
    )
    return {**estimate, "verdict": verdict}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
