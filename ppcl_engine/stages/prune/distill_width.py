"""Distil width: train the projections of the plan's sites, each by itself (paper, section 3.4).

Every projection starts at the ridge solution over the whole calibration set. It is then trained on
two relative squared errors: of its block's output against the teacher's state there, and of its own
output against what it replaces. Inputs are the teacher's own states, as in distil depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ...algorithms.detection.width_fits import Fit, fits_of, fits_of_blocks_given_back
from ...algorithms.detection.width_solutions import (
    Solutions,
    as_state,
    print_warnings,
    ridge_solutions,
)
from ...algorithms.distillation.projection_loss import ProjectionLoss
from ...algorithms.distillation.round_cache import USUAL, RoundCache, most_kept
from ...algorithms.distillation.rounds import FreshStates, Rounds
from ...algorithms.distillation.trainer import Trainer, resume_settings, rounding, saved_step
from ...data.calibration import CalibrationSet
from ...models.layout import layout_of, sites_named
from ...models.streaming import StateStore, Teacher, room_for_states
from ...plan import WidthSite
from ...run import Run
from ...settings.prune_settings import DistillWidthConfig
from ...system.atomic import write_text
from ...system.distributed import processes
from ...system.json_text import json_text
from ...system.tensor_files import TensorFile
from ..inputs import open_calibration, open_plan, open_teacher
from ..run_students import RunStudents


def distill_width(config: DistillWidthConfig) -> Path:
    """Writes `width/<place>.<kind>.safetensors`, weights and optimiser state, and the sites into
    the plan.

    Goes on from what is there. Raises Diverged with the last good state kept, Stopped on Ctrl-C
    after saving.
    """
    run, teacher = Run(config.run), open_teacher(config)
    calibration = open_calibration(config, teacher.weights)
    plan = open_plan(config, teacher.weights)
    if config.sites:
        plan = plan.with_parts(sites=sites_named(plan, config.sites, config.form), variants=())
    if not plan.sites:
        raise ValueError(
            f"{run.plan} has no width sites; run detect-width first, or name them with --sites"
        )
    fits = fits_of(plan, layout_of(plan, plan.everything()))
    given_back = fits_of_blocks_given_back(plan) if config.give_back else []
    plan = plan.with_parts(
        sites=tuple(_with_fitted(site, given_back) for site in plan.sites), variants=()
    )
    fits = list(dict.fromkeys(fits + given_back))
    cache = RoundCache(
        teacher=teacher,
        calibration=calibration,
        boundaries=most_kept(map(boundaries_of, fits)),
        folder=run.states if config.streamed else None,
    )
    trainings = [run.projection(f.place.name, f.kind) for f in fits]
    sums_gb = config.cache_gb or USUAL
    config = replace(config, cache_gb=cache.chosen(config, trainings))
    resumed = {f: _settings(config, calibration, f, _trained_on(run, f)) for f in fits}
    course = _Projections(config, run, teacher, calibration, resumed, sums_gb)
    own = processes().own(fits)
    course.start(own)
    Rounds(
        name="distill-width",
        course=course,
        parts=own,
        teacher=teacher,
        calibration=calibration,
        config=config,
        cache=cache,
    ).train()
    processes().wait()
    if processes().is_main:
        write_text(run.plan, plan.to_json() + "\n")
    return run.projections


def _with_fitted(site: WidthSite, given_back: list[Fit]) -> WidthSite:
    names = {f.place.name for f in given_back if (f.place.index, f.kind) == (site.block, site.kind)}
    return replace(site, fitted=tuple(sorted(names)))


def _settings(
    config: DistillWidthConfig, calibration: CalibrationSet, fit: Fit, student: str
) -> str:
    names = (
        "rounds",
        "updates",
        "learning_rate",
        "warm_up",
        "weight_decay",
        "cache_gb",
        "seed",
        "dtype",
    )
    what = {
        "form": fit.form,
        "source": fit.source and fit.source.name,
        "steps": fit.steps,
        "student": student,
    }
    return json_text(
        {**resume_settings(config, names), **what, "calibration": calibration.hash[:16]}
    )


def boundaries_of(fit: Fit) -> set[int]:
    """Which of the teacher's states the projection learns from (i: the input of block i)."""
    boundaries = {fit.place.index, fit.place.last + 1}
    return boundaries | {fit.source.index} if fit.source else boundaries


@dataclass
class _Projections:
    """How the projections are trained: a `Course` of rounds."""

    config: DistillWidthConfig
    run: Run
    teacher: Teacher
    calibration: CalibrationSet
    resumed: dict[Fit, str]
    """the settings that decide each one's result, in JSON"""
    sums_gb: float
    """memory for the normal equations of fits that share a sweep"""

    def __post_init__(self):
        self.students = RunStudents(
            self.run, self.teacher.config, self.teacher.architecture, polished=False
        )

    def start(self, fits: Sequence[Fit]) -> None:
        """Saves the ridge solutions of the projections that are not there yet, as step 0."""
        missing = [fit for fit in fits if saved_step(self.path(fit), self.settings(fit)) is None]
        store = StateStore(
            processes().folder(self.run.states / "width") if self.config.streamed else None,
            room=room_for_states(),
        )
        if not missing:
            # what a process left that was killed when all were saved
            store.clear()
            Solutions.beside(store).clear()
            return
        inputs = self.calibration.all_inputs()
        with torch.no_grad():
            solutions = ridge_solutions(
                self.teacher, self.students, inputs, missing, store, self.sums_gb
            )
        print_warnings(solutions)
        for fit, parts in solutions.items():
            trainer = self._trainer(fit)
            trainer.module.load_state_dict(as_state(parts))
            trainer.about["fit"] = json_text(
                {part: solution.report for part, solution in parts.items()}
            )
            trainer.save(self.path(fit), self.settings(fit))
        solutions.clear()

    def path(self, fit: Fit) -> Path:
        return self.run.projection(fit.place.name, fit.kind)

    def settings(self, fit: Fit) -> str:
        return self.resumed[fit]

    def name(self, fit: Fit) -> str:
        return fit.name

    def boundaries(self, fit: Fit) -> set[int]:
        return boundaries_of(fit)

    def begin(self, fit: Fit, states: FreshStates) -> Trainer:
        trainer = self._trainer(fit)
        trainer.restore(self.path(fit))
        return trainer

    def loss_at(
        self, fit: Fit, trainer: Trainer, states: FreshStates
    ) -> Callable[[int], torch.Tensor]:
        config = self.config
        loss = ProjectionLoss(self.teacher, self.students, fit, states, trainer.module)
        total = config.rounds * config.updates

        def at(step: int) -> torch.Tensor:
            return loss.at(step % len(states.batches), rounding(config, step, total))

        return at

    def _trainer(self, fit: Fit) -> Trainer:
        width, device = self.teacher.architecture.width(self.teacher.config), self.teacher.device
        maps = {
            part: nn.Linear(width, width, dtype=torch.float32, device=device) for part in fit.parts
        }
        return Trainer(nn.ModuleDict(maps), self.config.weight_decay)


def _trained_on(run: Run, fit: Fit) -> str:
    """Settings of the students that a projection is fitted to, so that it is trained again when
    they are."""
    places = [p for p in (fit.place, fit.source) if p and p.interval]
    return json_text([_origin(run.student(place.name)) for place in places])


def _origin(student: Path) -> str:
    if not student.exists():
        raise ValueError(f"{student} does not exist; run distill-depth first")
    file = TensorFile(student)
    return f"{file.text('settings')} step {file.text('step')}"
