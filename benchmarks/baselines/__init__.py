"""The methods that PPCL is compared with, each from its paper: what they select, and how they train
what stays.

All get the same teacher, calibration set, number of blocks to remove and budget of block passes.
"""

from __future__ import annotations

from collections.abc import Callable

from . import (
    cka_sequential,
    cosine,
    every_second,
    hierarchical_prune,
    mse,
    random_contiguous,
    tinyfusion,
)
from .base import Pruned, Task, model_of
from .chain import Budget

Baseline = Callable[..., Pruned]
"""(task, budget, removed=None): with `removed` given, nothing is selected and the whole budget
trains."""

BASELINES: dict[str, Baseline] = {
    "cka_sequential": cka_sequential.prune,
    "tinyfusion": tinyfusion.prune,
    "hierarchical_prune": hierarchical_prune.prune,
    "cosine": cosine.prune,
    "mse": mse.prune,
    "every_second": every_second.prune,
    "random_contiguous": random_contiguous.prune,
}

__all__ = ["BASELINES", "Baseline", "Budget", "Pruned", "Task", "model_of"]
