"""Distil depth: one student an interval, each by itself, on the teacher's own states (paper,
section 3.3).

Works in rounds. A round is one sweep of the teacher over fresh samples, no further than the last
interval, which leaves the states at interval boundaries in a cache; then every interval takes
its updates from them. Input: the teacher's input of block u; target: its output of block v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ...algorithms.distillation.kept_trainers import KeptTrainers
from ...algorithms.distillation.losses import interval_loss
from ...algorithms.distillation.quantization import quantised_in_training
from ...algorithms.distillation.rounds import FreshStates, RoundSettings, tell_reuse, unfinished
from ...algorithms.distillation.trainer import (
    Trainer,
    cosine_schedule,
    recorded,
    rounding,
    saved_step,
)
from ...algorithms.least_squares import NormalEquations, Solution
from ...architectures import BlockState
from ...data.calibration import CalibrationSet
from ...models.streaming import Teacher, mixed_precision
from ...models.surgery import build_student, interval_streams
from ...plan import Interval, PruningPlan, parse_intervals
from ...run import Run
from ...settings.prune_settings import DistillDepthConfig
from ...system.atomic import write_text
from ...system.distributed import processes
from ...system.interruption import Stopped, stop_on_interrupt
from ...system.json_text import json_text
from ...system.progress import Progress
from ..inputs import open_calibration, open_plan, open_teacher

RIDGE = 1e-4


def distill_depth(config: DistillDepthConfig) -> Path:
    """Writes `depth/<interval>.safetensors`, weights and optimiser state, and the students' form
    into the plan.

    Goes on from what is there. Raises Diverged (a ValueError) with the last good state kept,
    Stopped on Ctrl-C after saving.
    """
    run, teacher = Run(config.run), open_teacher(config)
    calibration = open_calibration(config, teacher.weights)
    plan = open_plan(config, teacher.weights)
    wanted = [plan.interval(i.name) for i in parse_intervals(config.intervals)] or list(
        plan.intervals
    )
    intervals = [replace(interval, correction=config.correction) for interval in wanted]
    settings = _settings(config, calibration)
    steps_done = {i.name: saved_step(run.student(i.name), settings) or 0 for i in intervals}
    processes().wait()  # a process that is ahead would change what this one counts
    own, total = processes().own(intervals), config.rounds * config.updates
    done = sum(steps_done[i.name] for i in own)
    if done < total * len(own):
        tell_reuse(
            teacher,
            calibration,
            round_settings(config, plan),
            run.states if config.streamed else None,
        )
    progress = Progress(total=total * len(own), initial=done, desc="distill-depth", unit="update")
    kept = KeptTrainers(run.student, lambda name: settings, config.rounds)
    with stop_on_interrupt() as asked, progress, kept.saved_when_stopped():
        for number in range(config.rounds):
            due = [i for i in own if kept.step(i.name) in unfinished(number, config.updates)]
            if due:
                _Round(
                    config, run, teacher, calibration, plan, due, number, kept, progress, asked
                ).work()
    processes().wait()
    students = {interval.name: interval for interval in intervals}
    trained = tuple(students.get(i.name, i) for i in plan.intervals)
    changed = trained != plan.intervals or any(steps < total for steps in steps_done.values())
    if processes().is_main and changed:
        write_text(run.plan, plan.with_parts(intervals=trained, variants=()).to_json() + "\n")
    return run.students


def _settings(config: DistillDepthConfig, calibration: CalibrationSet) -> str:
    names = (
        "init",
        "correction",
        "loss",
        "rounds",
        "updates",
        "learning_rate",
        "warm_up",
        "weight_decay",
        "cache_gb",
        "seed",
        "dtype",
    )
    return json_text({**recorded(config, names), "calibration": calibration.hash[:16]})


def round_settings(config: DistillDepthConfig, plan: PruningPlan) -> RoundSettings:
    """The same whichever of the plan's intervals are trained."""
    boundaries = 2 * len(plan.intervals) + 2
    return RoundSettings(
        updates=config.updates, cache_gb=config.cache_gb, seed=config.seed, boundaries=boundaries
    )


@dataclass
class _Round:
    """One sweep of the teacher and the updates that it feeds."""

    config: DistillDepthConfig
    run: Run
    teacher: Teacher
    calibration: CalibrationSet
    plan: PruningPlan
    intervals: list[Interval]
    number: int
    kept: KeptTrainers
    progress: Progress
    asked: Callable[[], bool]

    def work(self) -> None:
        wanted = {i.first for i in self.intervals} | {i.last + 1 for i in self.intervals}
        folder = (
            processes().folder(self.run.states / f"round_{self.number}")
            if self.config.streamed
            else None
        )
        settings = round_settings(self.config, self.plan)
        self.states = FreshStates(
            self.teacher, self.calibration, settings, self.number, wanted, folder
        )
        for interval in self.intervals:
            self._train(interval)
        self.states.clear()
        self.kept.end_round(self.number)

    def _train(self, interval: Interval) -> None:
        end = (self.number + 1) * self.config.updates
        trainer = self.kept.take(interval.name, self.teacher.device) or self._begun(interval)
        while trainer.step < end:
            trainer.update(*self._loss(interval, trainer), f"interval {interval.name}")
            self.progress.update()
            self.progress.set_postfix_str(
                f"{interval.name} loss {trainer.losses[-1]:.3g}", refresh=False
            )
            if self.asked():
                self.kept.save(interval.name, trainer)
                raise Stopped(
                    f"stopped at step {trainer.step} of interval {interval.name}; saved. Run the same command to go on"
                )
        self.kept.put(interval.name, trainer)

    def _begun(self, interval: Interval) -> Trainer:
        """From its file, or new."""
        path = self.run.student(interval.name)
        if path.exists():
            trainer = Trainer(self._empty_student(interval), self.config.weight_decay)
            trainer.restore(path)
            return trainer
        trainer = Trainer(self._new_student(interval), self.config.weight_decay)
        with torch.no_grad():
            self._fit_correction(interval, trainer)
        return trainer

    def _loss(self, interval: Interval, trainer: Trainer) -> tuple[torch.Tensor, float]:
        config, batch = self.config, trainer.step % len(self.states.batches)
        source, target = self._pair(interval, batch)
        total = config.rounds * config.updates
        with (
            quantised_in_training(trainer.module, rounding(config, trainer.step, total)),
            mixed_precision(self.teacher),
        ):
            student = self.teacher.architecture.run_block(trainer.module, source)
        streams = interval_streams(self.teacher.architecture, self.teacher.config, interval)
        rate = cosine_schedule(trainer.step, total, config.learning_rate, config.warm_up)
        return interval_loss(config.loss, student, target, streams), rate

    def _pair(self, interval: Interval, batch: int) -> tuple[BlockState, BlockState]:
        return self.states.state(interval.first, batch), self.states.state(interval.last + 1, batch)

    def _empty_student(self, interval: Interval) -> nn.Module:
        """Its tensors hold nothing yet, and all of them are trained."""
        with torch.device("meta"):
            student = build_student(self.teacher.architecture, self.teacher.config, interval)
        assert not list(student.buffers()), interval.name
        return student.to_empty(device=self.teacher.device).train()

    def _new_student(self, interval: Interval) -> nn.Module:
        """A copy of the teacher's block in float32, its correction the identity still."""
        teacher = self.teacher
        origin = (
            interval.first if self.config.init == "first" else (interval.first + interval.last) // 2
        )
        with torch.device("meta"):
            student = build_student(teacher.architecture, teacher.config, interval)
            like, copied = (
                teacher.architecture.build_block(teacher.config, i)
                for i in (interval.first, origin)
            )
        if _shapes(copied.state_dict()) != _shapes(like.state_dict()):
            raise ValueError(
                f"interval {interval.name}: block {origin}, its middle, has other parts than block {interval.first}, "
                "whose form the student has; distil it with --init first"
            )
        values = teacher.weights.block(origin, torch.float32, teacher.device).state_dict()
        for name, tensor in student.state_dict().items():
            values.setdefault(name, torch.zeros(tensor.shape, device=teacher.device))
        student.load_state_dict(values, assign=True)
        return student.train()

    def _fit_correction(self, interval: Interval, trainer: Trainer) -> None:
        """Least squares from what the copied block returns to the teacher's state after the
        interval."""
        if interval.correction == "none":
            return
        # still the identity, so the student returns what its block does
        maps = trainer.module.correction.maps
        width = self.teacher.architecture.width(self.teacher.config)
        equations = {stream: NormalEquations(width, width, self.teacher.device) for stream in maps}
        for batch in self.states.batches:
            source, target = self._pair(interval, batch)
            with mixed_precision(self.teacher):
                output = self.teacher.architecture.run_block(trainer.module, source)
            for stream, sums in equations.items():
                x = output.real_tokens(stream).float()
                sums.add(x, target.real_tokens(stream).float() - x)
        fits = {
            stream: set_map(maps[stream], sums.shared(processes().sum))
            for stream, sums in equations.items()
        }
        trainer.about["fit"] = json_text(
            {stream: solution.report for stream, solution in fits.items()}
        )


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def set_map(target: nn.Module, equations: NormalEquations) -> Solution:
    """The ridge solution into a Linear, or its best approximation of the rank of a pair of Linears.

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
