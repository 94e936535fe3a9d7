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
from torch import nn
from tqdm import tqdm

from ..architectures import BlockState
from ..config import VariantsConfig
from ..cost import CostModel
from ..files import write_text
from ..intervals import least_damage
from ..plan import FULL, Interval, PruningPlan, Variant
from ..run import Run, load_student, open_calibration, open_plan, open_teacher
from ..streaming import Teacher

SHARES = {"large": 1 / 3, "medium": 2 / 3, "small": 1.0}
STORED_BYTES = 2  # bfloat16


def variants(config: VariantsConfig) -> Path:
    """Writes every interval's damage and the named variants into `plan.json`."""
    run, teacher = Run(config.run), open_teacher(config)
    calibration = open_calibration(config, teacher.weights)
    plan = open_plan(config, teacher.weights)
    batches = max(1, round(config.samples / calibration.samples * len(calibration)))
    inputs = calibration.all_inputs()[-batches:]
    with torch.no_grad():
        measured = Damage(teacher, run, plan, inputs)
        plan = plan.with_parts(intervals=tuple(measured.interval(i) for i in tqdm(plan.intervals, desc="variants")))
        plan = plan.with_parts(variants=tuple(_named(config, teacher, plan, measured, inputs[0])))
    write_text(run.plan, plan.to_json() + "\n")
    return run.plan


class Damage:
    """Velocity error of sets of intervals on the same inputs; students are kept in memory (one block each)."""

    def __init__(self, teacher: Teacher, run: Run, plan: PruningPlan, inputs: list):
        self.teacher, self.run, self.plan = teacher, run, plan
        self.embedded = [teacher.embed(row) for row in inputs]
        self.target = self._velocities(())

    def of(self, intervals: tuple[Interval, ...]) -> float:
        error, power = self.per_sample(intervals)
        return float(error.sum() / power.sum())

    def per_sample(self, intervals: tuple[Interval, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of the velocity and its own square, each summed over a sample."""
        pairs = list(zip(self._velocities(intervals), self.target, strict=True))
        return torch.cat([_squares(a - b) for a, b in pairs]), torch.cat([_squares(b) for _, b in pairs])

    def interval(self, interval: Interval) -> Interval:
        parameters = sum(t.numel() for t in load_student(self.run, self.teacher, interval).parameters())
        return replace(interval, score=self.of((interval,)), parameters=parameters)

    def _velocities(self, intervals: tuple[Interval, ...]) -> list[torch.Tensor]:
        states = list(self.embedded)
        starts = {interval.first: interval for interval in intervals}
        gaps = {index for interval in intervals for index in interval.blocks[1:]}
        kept = [index for index in range(self.teacher.num_blocks) if index not in gaps]
        students = {i: load_student(self.run, self.teacher, starts[i]) for i in starts}
        teacher_blocks = self.teacher.blocks([index for index in kept if index not in starts])
        for index in kept:
            block = students[index] if index in starts else next(teacher_blocks)[1]
            states = [self._run(block, state) for state in states]
        return [self.teacher.architecture.finish(self.teacher.outer, state).float() for state in states]

    def _run(self, block: nn.Module, state: BlockState) -> BlockState:
        return self.teacher.architecture.run_block(block, state)


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().flatten(1).sum(1).cpu()


def _named(config: VariantsConfig, teacher: Teacher, plan: PruningPlan, measured: Damage, inputs) -> list[Variant]:
    """full, large, medium, small, and one for each limit that was given."""
    grid = tuple(inputs["grid"][0].tolist())
    cost = CostModel(teacher.architecture, teacher.config, grid, inputs["encoder_hidden_states"].shape[1])
    milliseconds = _block_milliseconds(measured)
    full = cost.variant(plan, Variant(name=FULL)).parameters
    most = full - cost.variant(plan, plan.everything()).parameters
    sets = {FULL: ()}
    sets |= {name: _subset(cost, plan, most * share) for name, share in SHARES.items()}
    limits = {
        "parameters": full - config.most_parameters * 1e6 if config.most_parameters else None,
        "megabytes": full - config.most_megabytes * 1e6 / STORED_BYTES if config.most_megabytes else None,
    }
    for name, saving in limits.items():
        if saving is not None:
            sets[f"within_{name}"] = _subset(cost, plan, saving)
    if config.most_milliseconds:
        removed = (milliseconds * plan.num_blocks - config.most_milliseconds) / milliseconds
        sets["within_milliseconds"] = _subset_of([float(i.removed) for i in plan.intervals], plan, removed)
    return [_variant(name, chosen, plan, cost, milliseconds, measured) for name, chosen in sets.items()]


def _subset(cost: CostModel, plan: PruningPlan, saving: float) -> tuple[str, ...]:
    """Intervals that save at least `saving` parameters at the least damage."""
    gains = [sum(cost.block(b).parameters for b in i.blocks) - cost.student(i).parameters for i in plan.intervals]
    return _subset_of([float(gain) for gain in gains], plan, saving)


def _subset_of(gains: list[float], plan: PruningPlan, saving: float) -> tuple[str, ...]:
    chosen = least_damage([(g, i.score) for g, i in zip(gains, plan.intervals, strict=True)], saving)
    if chosen is None:
        raise ValueError(
            "even with all intervals replaced the model is above this limit; raise it, or detect more with --remove"
        )
    return tuple(plan.intervals[index].name for index in chosen)


def _variant(name, chosen, plan: PruningPlan, cost: CostModel, milliseconds: float, measured: Damage) -> Variant:
    counted = cost.variant(plan, Variant(name=name, intervals=chosen))
    removed = sum(plan.interval(n).removed for n in chosen)
    return Variant(
        name=name,
        intervals=chosen,
        parameters=counted.parameters,
        bytes=counted.parameters * STORED_BYTES,
        flops=counted.flops,
        milliseconds=milliseconds * (plan.num_blocks - removed),
        damage=measured.of(tuple(plan.interval(n) for n in chosen)),
    )


def _block_milliseconds(measured: Damage, repeats: int = 5) -> float:
    """Median time of block 0 on one sample-batch of the calibration, milliseconds a sample."""
    block, state = measured.teacher.block(0), measured.embedded[0]
    return 1e3 * _median_seconds(lambda: measured._run(block, state), repeats) / len(state.image)


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeats // 2]
