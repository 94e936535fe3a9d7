"""Variants: what each interval costs in quality, and the named sizes (method: plug and play).

Any subset of intervals may be on. An interval's damage is the squared error of the final velocity,
relative to the teacher's, with only this interval replaced; it is nearly additive, so a solver
over single damages picks the subset for a size, and the chosen subsets are then measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ...algorithms.detection.damage import Damage
from ...algorithms.detection.intervals import least_damage
from ...models.cost import STORED_BYTES, CostModel
from ...models.layout import layout_of
from ...models.streaming import StateStore, room_for_states
from ...plan import FULL, Interval, PruningPlan, Variant
from ...run import Run
from ...settings.prune_settings import VariantsConfig
from ...system.atomic import write_text
from ..inputs import open_calibration, open_plan, open_teacher
from ..run_students import RunStudents

SHARES = {"large": 1 / 3, "medium": 2 / 3, "small": 1.0}


def variants(config: VariantsConfig) -> Path:
    """Writes every interval's damage and the named variants into `plan.json`."""
    run, teacher = Run(config.run), open_teacher(config)
    calibration = open_calibration(config, teacher.weights)
    plan = open_plan(config, teacher.weights)
    batches = max(1, round(config.samples / calibration.samples * len(calibration)))
    inputs = calibration.all_inputs()[-batches:]
    with torch.no_grad():
        students = RunStudents(run, teacher.config, teacher.architecture)
        store = (
            StateStore(run.states / "variants", room=room_for_states()) if config.streamed else None
        )
        measured = Damage(teacher, students, plan, inputs, cache_gb=config.cache_gb, store=store)
        cost = CostModel.at(teacher.architecture, teacher.config, inputs[0])
        measured.measure(
            [layout_of(plan, _alone(interval)) for interval in plan.intervals], "intervals"
        )
        plan = plan.with_parts(
            intervals=tuple(_interval(i, measured, cost) for i in plan.intervals)
        )
        tuned = tuple(v for v in plan.variants if v.tuned)
        plan = plan.with_parts(variants=(*_named(config, plan, measured, cost), *tuned))
    write_text(run.plan, plan.to_json() + "\n")
    return run.plan


def _alone(interval: Interval) -> Variant:
    return Variant(name=interval.name, intervals=(interval.name,))


def _interval(interval: Interval, measured: Damage, cost: CostModel) -> Interval:
    return replace(
        interval, score=measured.of(_alone(interval)), parameters=cost.student(interval).parameters
    )


def _named(
    config: VariantsConfig, plan: PruningPlan, measured: Damage, cost: CostModel
) -> list[Variant]:
    """full; large, medium, small: intervals alone; smallest: width sites too; and one for each
    limit that was given."""
    depth = replace(plan.everything(), sites=())
    milliseconds = _block_milliseconds(measured)
    full = cost.variant(plan, Variant(name=FULL))
    most = full.parameters - cost.variant(plan, depth).parameters
    sets = {FULL: ()}
    sets |= {name: subset(cost, plan, most * share) for name, share in SHARES.items()}
    limits = {
        "parameters": full.parameters - config.most_parameters * 1e6
        if config.most_parameters
        else None,
        "megabytes": full.stored - config.most_megabytes * 1e6 / STORED_BYTES
        if config.most_megabytes
        else None,
    }
    for name, saving in limits.items():
        if saving is not None:
            sets[f"within_{name}"] = subset(cost, plan, saving)
    if config.most_milliseconds:
        removed = (milliseconds * plan.num_blocks - config.most_milliseconds) / milliseconds
        sets["within_milliseconds"] = _subset_of(
            [float(i.removed) for i in plan.intervals], plan, removed
        )
    named = [Variant(name=name, intervals=chosen) for name, chosen in sets.items()]
    if plan.sites:
        named.append(replace(plan.everything(), name="smallest"))
    measured.measure([layout_of(measured.plan, variant) for variant in named], "variants")
    return [_measured(variant, plan, cost, milliseconds, measured) for variant in named]


def subset(cost: CostModel, plan: PruningPlan, saving: float) -> tuple[str, ...]:
    """Intervals that save at least `saving` parameters at the least damage."""
    gains = [
        sum(cost.block(b).parameters for b in i.blocks) - cost.student(i).parameters
        for i in plan.intervals
    ]
    return _subset_of([float(gain) for gain in gains], plan, saving)


def _damage_of(interval: Interval) -> float:
    """Raises ValueError for an interval whose damage was not measured."""
    if interval.score is None:
        raise ValueError(f"the plan has no score of interval {interval.name}; run detect")
    return interval.score


def _subset_of(gains: list[float], plan: PruningPlan, saving: float) -> tuple[str, ...]:
    chosen = least_damage(
        [(g, _damage_of(i)) for g, i in zip(gains, plan.intervals, strict=True)], saving
    )
    if chosen is None:
        raise ValueError(
            "even with all intervals replaced the model is above this limit; raise it, or detect more with --remove"
        )
    return tuple(plan.intervals[index].name for index in chosen)


def _measured(
    variant: Variant, plan: PruningPlan, cost: CostModel, milliseconds: float, measured: Damage
) -> Variant:
    """Time: as many of a full block's as the places' FLOPs make."""
    counted, whole = cost.variant(plan, variant), cost.variant(plan, Variant(name=FULL))
    return replace(
        variant,
        parameters=counted.parameters,
        bytes=counted.bytes,
        flops=counted.flops,
        milliseconds=milliseconds * plan.num_blocks * counted.flops / whole.flops,
        damage=measured.of(variant),
    )


def _block_milliseconds(measured: Damage, repeats: int = 5) -> float:
    """Median time of block 0 on one sample-batch of the calibration, milliseconds a sample."""
    block, state = measured.teacher.block(0), measured.embedded[0]
    return (
        1e3
        * _median_seconds(lambda: measured.teacher.architecture.run_block(block, state), repeats)
        / len(state.image)
    )


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeats // 2]
