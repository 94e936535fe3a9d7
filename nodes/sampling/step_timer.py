"""Measures the seconds per step of a MODEL while the host samples with it."""

from __future__ import annotations

import time
from statistics import median
from weakref import WeakKeyDictionary

import torch
from comfy.patcher_extension import WrappersMP

KEY = "ppcl_clock"
_steps: WeakKeyDictionary = WeakKeyDictionary()
"""the host's patcher -> seconds of each step of its last run"""


def time_steps(model) -> None:
    """Times this MODEL and every clone of it from now on."""
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _new_run)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _timed_step)


def seconds_a_step(model) -> float | None:
    """Median over the last sampling with this MODEL (not a clone); None before the first."""
    steps = _steps.get(model)
    return median(steps) if steps else None


def _new_run(executor, guider, *arguments, **named):
    _steps[guider.model_patcher] = []
    return executor(guider, *arguments, **named)


def _timed_step(executor, *arguments, **named):
    start = time.perf_counter()
    result = executor(*arguments, **named)
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)
    _steps.setdefault(executor.class_obj.model_patcher, []).append(time.perf_counter() - start)
    return result
