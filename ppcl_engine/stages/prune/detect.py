"""Detect: which runs of blocks one student can replace (paper, section 3.2).

By the curves of `algorithms.detection.curves`: the paper's rule on the alignment (`ppcl`), or the
intervals of least damage for a number of blocks to remove (`budget`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ... import __version__
from ...algorithms.detection.chains import measure
from ...algorithms.detection.curves import Curves, block_passes, load_curves, section_starts
from ...algorithms.detection.intervals import (
    DEGENERATE,
    PUBLISHED_SHARE,
    budget_intervals,
    curve_scale,
    first_difference,
    greedy_intervals,
    largest_difference,
    pairs,
    reach,
    stability,
)
from ...algorithms.least_squares import RIDGE_OF
from ...data.calibration import CalibrationSet
from ...models.streaming import Teacher
from ...plan import Interval, PruningPlan
from ...run import Run
from ...settings.prune_settings import DetectConfig
from ...system.atomic import write_json, write_text
from ...system.json_text import json_text
from ...system.tensor_files import TensorFile
from ..inputs import open_calibration, open_teacher

NO_DAMAGE = 1e-12  # of an interval, relative to the velocity


def detect(config: DetectConfig) -> Path:
    """Writes `curves.safetensors` (kept while its settings hold), `detect.json` and `plan.json`."""
    run, teacher = Run(config.run), open_teacher(config)
    calibration = open_calibration(config, teacher.weights)
    protect = _protected(config, teacher.num_blocks)
    settings = _settings(config, run, calibration)
    curves, measured_blocks = load_curves(run.curves, settings)
    if curves is None or measured_blocks < teacher.num_blocks - 1:
        batches = max(2, round(config.samples / calibration.samples * len(calibration)))
        curves = measure(
            config,
            run,
            teacher,
            calibration.all_inputs()[:batches],
            settings,
            curves,
            measured_blocks,
        )
    result = choose(config, curves, protect, section_starts(teacher))
    write_json(run.detection, result)
    plan = _plan(config, teacher, calibration, result["intervals"])
    write_text(run.plan, plan.to_json() + "\n")
    if config.explain:
        print("\n".join(result["explain"]))
    return run.plan


def _settings(config: DetectConfig, run: Run, calibration: CalibrationSet) -> str:
    """The settings that decide the curves, saved with them and compared when they are used again."""
    probes = [
        TensorFile(path).metadata.get("settings")
        for path in sorted(run.probes.glob("block_*.safetensors"))
    ]
    names = (
        "samples",
        "longest",
        "kernel",
        "biased",
        "local",
        "tokens",
        "bootstrap",
        "seed",
        "dtype",
    )
    measured = {name: getattr(config, name) for name in names}
    return json_text(
        {"calibration": calibration.hash, "probes": probes, "ridge": RIDGE_OF, **measured}
    )


def _plan(
    config: DetectConfig, teacher: Teacher, calibration: CalibrationSet, intervals: list[dict]
) -> PruningPlan:
    return PruningPlan(
        architecture=teacher.architecture.name,
        config=teacher.config,
        num_blocks=teacher.num_blocks,
        fingerprint=teacher.weights.fingerprint,
        intervals=tuple(Interval(**row) for row in intervals),
        provenance={
            "tool": f"ppcl {__version__}",
            "source_model": Path(config.model).name,
            "calibration": calibration.hash,
            "method": config.method,
            "seed": config.seed,
        },
    )


def choose(
    config: DetectConfig,
    curves: Curves,
    protect: frozenset[int],
    starts: frozenset[int] = frozenset(),
) -> dict:
    """Intervals by the configured rule, their stability over resamples, and both rules'
    explanations."""
    blocks, longest = curves.cka.shape[:2]
    remove = config.remove or round(blocks * PUBLISHED_SHARE)
    damage = curves.damage_of(torch.ones_like(curves.power))
    rules = {
        "ppcl": partial(_greedy, config, blocks, longest, protect, starts),
        "budget": lambda cost: budget_intervals(cost, blocks, longest, remove, protect, starts),
    }
    curve = curves.cka_of(0)
    resamples = curves.cka.shape[2] - 1
    if config.method == "ppcl":
        chosen = rules["ppcl"](curve)
        again = [rules["ppcl"](curves.cka_of(column)) for column in range(1, resamples + 1)]
    else:
        check_damage(damage, pairs(blocks, longest, starts))
        chosen = rules["budget"](damage)
        again = [
            rules["budget"](curves.damage_of(weights))
            for weights in _sample_weights(curves, resamples, config.seed)
        ]
    shares = stability(chosen, again) if resamples else [None] * len(chosen)
    return {
        "method": config.method,
        "intervals": [
            {"first": u, "last": v, "score": damage(u, v), "stability": share}
            for (u, v), share in zip(chosen, shares, strict=True)
        ],
        "fits": [{"first": u, "last": v, **curves.fit_of(u, v)} for u, v in chosen],
        "explain": _explanation(config, protect, chosen, curves, damage, starts),
        "block_passes_per_batch": block_passes(blocks, longest, 1 if config.local else 2, starts),
        "curve_scale": largest_difference(curve, blocks, longest, starts),
    }


def check_damage(damage: Callable[[int, int], float], candidates: list[tuple[int, int]]) -> None:
    """Raises ValueError where no interval costs anything, as in a model whose blocks do nothing."""
    if not max((damage(u, k) for u, k in candidates), default=1.0) > NO_DAMAGE:
        raise ValueError(
            "every block behaves like a linear map: the model looks untrained, so any interval would be arbitrary; check "
            "the model file"
        )


def _greedy(config, blocks, longest, protect, starts, curve) -> list[tuple[int, int]]:
    scale = curve_scale(curve, blocks, longest, starts)
    found = greedy_intervals(
        curve, blocks, longest, scale, config.eps, config.max_drop, protect, starts
    )
    return [(f.first, f.last) for f in found if f.last > f.first]


def _sample_weights(curves: Curves, resamples: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    samples = len(curves.power)
    choice = torch.randint(samples, (resamples, samples), generator=generator)
    return [torch.bincount(row, minlength=samples).double() for row in choice]


def _explanation(config, protect, chosen, curves: Curves, damage, starts) -> list[str]:
    lines = _greedy_explanation(config, protect, curves, starts)
    blocks, longest = curves.cka.shape[:2]
    if config.method == "budget":
        for u, v in chosen:
            last = reach(u, blocks, longest, starts)
            longer = f"; to {v + 1}: {damage(u, v + 1):.4f}" if v < last else ""
            drop = first_difference(curves.cka_of(0), u, v)
            lines.append(
                f"budget {u}-{v}: damage {damage(u, v):.4f}, D at its end {drop:.5f}{longer}"
            )
    passes = block_passes(blocks, longest, 1 if config.local else 2, starts)
    return [*lines, f"cost: {passes:,} block passes a batch"]


def _greedy_explanation(config, protect, curves: Curves, starts) -> list[str]:
    """What the paper's rule says, whether it is the one that was asked for or not."""
    blocks, longest = curves.cka.shape[:2]
    curve, scale = curves.cka_of(0), largest_difference(curves.cka_of(0), blocks, longest, starts)
    if scale < DEGENERATE:
        return [
            f"ppcl finds nothing: the CKA curves are flat (largest first difference {scale:.1e})"
        ]
    found = greedy_intervals(
        curve, blocks, longest, scale, config.eps, config.max_drop, protect, starts
    )
    return [f"ppcl {f.first}-{f.last}: ends because {f.reason}" for f in found]


def _protected(config: DetectConfig, blocks: int) -> frozenset[int]:
    words = config.protect.replace(",", " ").split()
    if not all(re.fullmatch("[0-9]{1,4}", word) and int(word) < blocks for word in words):
        raise ValueError(
            f"--protect {config.protect!r}: give block numbers from 0 to {blocks - 1}, as '0 1'"
        )
    return frozenset(map(int, words))
