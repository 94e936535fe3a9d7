"""Distil depth: one student an interval, each by itself, on the teacher's own states (paper,
section 3.3).

Works in rounds. A round is one sweep of the teacher over fresh samples, no further than the last
interval. Where it has come to an interval's end, that interval takes its updates from the states at
both its ends. Input: the teacher's input of block u; target: its output of block v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ...algorithms.distillation.losses import interval_loss
from ...algorithms.distillation.quantization import quantised_in_training
from ...algorithms.distillation.round_cache import RoundCache, most_kept
from ...algorithms.distillation.rounds import FreshStates, Rounds
from ...algorithms.distillation.trainer import Trainer, resume_settings, rounding, saved_step
from ...algorithms.least_squares import NormalEquations, fit_map
from ...architectures import BlockState
from ...data.calibration import CalibrationSet
from ...models.streaming import Teacher, mixed_precision
from ...models.surgery import build_student, interval_streams
from ...plan import Interval, parse_intervals
from ...run import Run
from ...settings.prune_settings import DistillDepthConfig
from ...system.atomic import write_text
from ...system.distributed import processes
from ...system.json_text import json_text
from ..inputs import open_calibration, open_plan, open_teacher


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
    cache = RoundCache(
        teacher=teacher,
        calibration=calibration,
        boundaries=most_kept(map(boundaries_of, plan.intervals)),
        folder=run.states if config.streamed else None,
    )
    trainings = [run.student(interval.name) for interval in plan.intervals]
    config = replace(config, cache_gb=cache.chosen(config, trainings))
    course = _Students(config, run, teacher, _settings(config, calibration))
    steps_done = [saved_step(course.path(i), course.settings(i)) or 0 for i in intervals]
    processes().wait()  # a process that is ahead would change what this one counts
    Rounds(
        name="distill-depth",
        course=course,
        parts=processes().own(intervals),
        teacher=teacher,
        calibration=calibration,
        config=config,
        cache=cache,
    ).train()
    processes().wait()
    students = {interval.name: interval for interval in intervals}
    trained = tuple(students.get(i.name, i) for i in plan.intervals)
    total = config.rounds * config.updates
    changed = trained != plan.intervals or min(steps_done) < total
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
    return json_text({**resume_settings(config, names), "calibration": calibration.hash[:16]})


def boundaries_of(interval: Interval) -> set[int]:
    """Which of the teacher's states its student learns from (i: the input of block i)."""
    return {interval.first, interval.last + 1}


@dataclass
class _Students:
    """How an interval's student is trained: a `Course` of rounds."""

    config: DistillDepthConfig
    run: Run
    teacher: Teacher
    resumed: str
    """the settings that decide every student's result, in JSON"""

    def path(self, interval: Interval) -> Path:
        return self.run.student(interval.name)

    def settings(self, interval: Interval) -> str:
        return self.resumed

    def name(self, interval: Interval) -> str:
        return f"interval {interval.name}"

    def boundaries(self, interval: Interval) -> set[int]:
        return boundaries_of(interval)

    def begin(self, interval: Interval, states: FreshStates) -> Trainer:
        path = self.path(interval)
        if path.exists():
            trainer = Trainer(self._empty_student(interval), self.config.weight_decay)
            trainer.restore(path)
            return trainer
        trainer = Trainer(self._new_student(interval), self.config.weight_decay)
        with torch.no_grad():
            self._fit_correction(interval, trainer, states)
        return trainer

    def loss_at(
        self, interval: Interval, trainer: Trainer, states: FreshStates
    ) -> Callable[[int], torch.Tensor]:
        config, architecture = self.config, self.teacher.architecture
        streams = interval_streams(architecture, self.teacher.config, interval)
        total = config.rounds * config.updates

        def loss(step: int) -> torch.Tensor:
            source, target = _pair(states, interval, step % len(states.batches))
            bits = rounding(config, step, total)
            with quantised_in_training(trainer.module, bits), mixed_precision(self.teacher):
                student = architecture.run_block(trainer.module, source)
            return interval_loss(config.loss, student, target, streams)

        return loss

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

    def _fit_correction(self, interval: Interval, trainer: Trainer, states: FreshStates) -> None:
        """Least squares from what the copied block returns to the teacher's state after the
        interval."""
        if interval.correction == "none":
            return
        # still the identity, so the student returns what its block does
        maps = trainer.module.correction.maps
        width = self.teacher.architecture.width(self.teacher.config)
        equations = {stream: NormalEquations(width, width, self.teacher.device) for stream in maps}
        for batch in states.batches:
            source, target = _pair(states, interval, batch)
            with mixed_precision(self.teacher):
                output = self.teacher.architecture.run_block(trainer.module, source)
            for stream, sums in equations.items():
                x = output.real_tokens(stream).float()
                sums.add(x, target.real_tokens(stream).float() - x)
        fits = {
            stream: fit_map(maps[stream], sums.shared(processes().sum))
            for stream, sums in equations.items()
        }
        trainer.about["fit"] = json_text(
            {stream: solution.report for stream, solution in fits.items()}
        )


def _pair(states: FreshStates, interval: Interval, batch: int) -> tuple[BlockState, BlockState]:
    """What the student reads, and what the teacher makes of it."""
    return states.state(interval.first, batch), states.state(interval.last + 1, batch)


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
