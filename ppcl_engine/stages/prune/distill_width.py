"""Distil width: train the projections of the plan's sites, each by itself (paper, section 3.4).

Every projection starts at the ridge solution over the whole calibration set. It is then trained on
two relative squared errors: of its block's output against the teacher's state there, and of its own
output against what it replaces. Inputs are the teacher's own states, as in distil depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...algorithms.detection.width_fits import (
    Fit,
    Solutions,
    as_state,
    counted,
    fits_of,
    fits_of_blocks_given_back,
    own_pair,
    print_warnings,
    ridge_solutions,
    standing_block,
)
from ...algorithms.distillation.kept_trainers import KeptTrainers
from ...algorithms.distillation.losses import relative_mse
from ...algorithms.distillation.quantization import quantised_in_training
from ...algorithms.distillation.rounds import FreshStates, RoundSettings, tell_reuse, unfinished
from ...algorithms.distillation.trainable import twin
from ...algorithms.distillation.trainer import (
    Trainer,
    cosine_schedule,
    recorded,
    rounding,
    saved_step,
)
from ...architectures import BlockState
from ...data.calibration import CalibrationSet
from ...models.layout import Place, layout_of
from ...models.streaming import StateStore, Teacher, mixed_precision
from ...models.surgery import project, projection_modules
from ...plan import PruningPlan, WidthSite, parse_sites
from ...run import Run
from ...settings.prune_settings import DistillWidthConfig
from ...system.atomic import write_text
from ...system.distributed import processes
from ...system.interruption import Stopped, stop_on_interrupt
from ...system.json_text import json_text
from ...system.progress import Progress
from ...system.tensor_files import TensorFile
from ..inputs import RunStudents, open_calibration, open_plan, open_teacher


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
        plan = plan.with_parts(sites=parse_sites(config.sites, config.form), variants=())
    if not plan.sites:
        raise ValueError(
            f"{run.plan} has no width sites; run detect-width first, or name them with --sites"
        )
    fits = fits_of(plan, layout_of(plan, plan.everything()))
    given_back = fits_of_blocks_given_back(plan) if config.give_back else []
    plan = plan.with_parts(
        sites=tuple(_with_fitted(site, given_back) for site in plan.sites), variants=()
    )
    work = _Work(config, run, teacher, calibration, plan, list(dict.fromkeys(fits + given_back)))
    work.start()
    work.train()
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
    return json_text({**recorded(config, names), **what, "calibration": calibration.hash[:16]})


@dataclass
class _Work:
    config: DistillWidthConfig
    run: Run
    teacher: Teacher
    calibration: CalibrationSet
    plan: PruningPlan
    fits: list[Fit]

    def __post_init__(self):
        self.students = RunStudents(
            self.run, self.teacher.config, self.teacher.architecture, polished=False
        )
        origin = {fit: _trained_on(self.run, fit) for fit in self.fits}
        self.settings = {
            fit: _settings(self.config, self.calibration, fit, origin[fit]) for fit in self.fits
        }
        self.own = processes().own(self.fits)

    def start(self) -> None:
        """Saves the ridge solutions of the projections that are not there yet, as step 0."""
        missing = [fit for fit in self.own if self._step(fit) is None]
        store = StateStore(
            processes().folder(self.run.states / "width") if self.config.streamed else None
        )
        if not missing:
            # what a process left that was killed when all were saved
            store.clear(), Solutions.beside(store).clear()
            return
        inputs = self.calibration.all_inputs()
        with torch.no_grad():
            solutions = ridge_solutions(
                self.teacher, self.students, inputs, missing, store, self.config.cache_gb
            )
        print_warnings(solutions)
        for fit, parts in solutions.items():
            trainer = self._trainer(fit)
            trainer.module.load_state_dict(as_state(parts))
            trainer.about["fit"] = json_text(
                {part: solution.report for part, solution in parts.items()}
            )
            trainer.save(self._path(fit), self.settings[fit])
        solutions.clear()

    def train(self) -> None:
        config, done = self.config, sum(self._step(fit) for fit in self.own)
        total = config.rounds * config.updates * len(self.own)
        if done < total:
            folder = self.run.states if config.streamed else None
            tell_reuse(self.teacher, self.calibration, self.round_settings, folder)
        progress = Progress(total=total, initial=done, desc="distill-width", unit="update")
        kept = KeptTrainers(self._path, self.settings.__getitem__, config.rounds)
        with stop_on_interrupt() as asked, progress, kept.saved_when_stopped():
            for number in range(config.rounds):
                due = [
                    fit for fit in self.own if kept.step(fit) in unfinished(number, config.updates)
                ]
                if due:
                    _Round(self, due, number, kept, progress, asked).work()

    @property
    def round_settings(self) -> RoundSettings:
        config, boundaries = self.config, 4 * len(self.fits)
        return RoundSettings(
            updates=config.updates,
            cache_gb=config.cache_gb,
            boundaries=boundaries,
            seed=config.seed,
        )

    def _path(self, fit: Fit) -> Path:
        return self.run.projection(fit.place.name, fit.kind)

    def _step(self, fit: Fit) -> int | None:
        return saved_step(self._path(fit), self.settings[fit])

    def restored(self, fit: Fit) -> Trainer:
        trainer = self._trainer(fit)
        trainer.restore(self._path(fit))
        return trainer

    def _trainer(self, fit: Fit) -> Trainer:
        width, options = (
            self.teacher.architecture.width(self.teacher.config),
            {"device": self.teacher.device},
        )
        maps = {part: nn.Linear(width, width, dtype=torch.float32, **options) for part in fit.parts}
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


@dataclass
class _Round:
    """One sweep of the teacher and the updates that it feeds."""

    job: _Work
    fits: list[Fit]
    number: int
    kept: KeptTrainers
    progress: Progress
    asked: Callable[[], bool]

    def work(self) -> None:
        config, teacher = self.job.config, self.job.teacher
        wanted = {
            b
            for fit in self.fits
            for p in (fit.place, fit.source)
            if p
            for b in (p.index, p.last + 1)
        }
        settings = self.job.round_settings
        place = processes().folder(self.job.run.states / f"width_round_{self.number}")
        folder = place if config.streamed else None
        self.states = FreshStates(
            teacher, self.job.calibration, settings, self.number, wanted, folder
        )
        for fit in self.fits:
            self._train(fit)
        self.states.clear()
        self.kept.end_round(self.number)

    def _train(self, fit: Fit) -> None:
        config, job = self.job.config, self.job
        end = (self.number + 1) * config.updates
        trainer = self.kept.take(fit, job.teacher.device) or job.restored(fit)
        lesson = _Lesson(job, fit, self.states, trainer.module)
        while trainer.step < end:
            total = config.rounds * config.updates
            rate = cosine_schedule(trainer.step, total, config.learning_rate, config.warm_up)
            bits = rounding(config, trainer.step, total)
            trainer.update(
                lesson.loss(trainer.step % len(self.states.batches), bits), rate, fit.name
            )
            self.progress.update()
            self.progress.set_postfix_str(
                f"{fit.name} loss {trainer.losses[-1]:.3g}", refresh=False
            )
            if self.asked():
                self.kept.save(fit, trainer)
                raise Stopped(
                    f"stopped at step {trainer.step} of {fit.name}; saved. Run the same command to go on"
                )
        self.kept.put(fit, trainer)


class _Lesson:
    """The block with its projection, and without: inputs, outputs and losses on the cached
    batches."""

    def __init__(self, job: _Work, fit: Fit, states: FreshStates, maps: nn.ModuleDict):
        self.teacher, self.fit, self.states, self.maps = job.teacher, fit, states, maps
        self.architecture = job.teacher.architecture
        self.used = job.teacher.used_streams(fit.place.last)
        self.plain = self._block(job, fit.place)
        self.source = self._block(job, fit.source) if fit.source else None
        self.pruned = self._projected(job)
        self.known: dict[int, tuple] = {}

    def loss(self, batch: int, bits: str) -> torch.Tensor:
        """Aligned output of the block plus own output of each map, which stand in that block,
        relative squared errors."""
        if batch not in self.known:
            with torch.no_grad():
                self.known[batch] = self._targets(batch)
        pairs, source = self.known[batch]
        state, target = self.states.state(self.fit.place.index, batch), self._target(batch)
        if source is not None:
            state = replace(state, text=source["text"], modulated_text=source["text_modulated"])
        with quantised_in_training(self.pruned, bits), mixed_precision(self.teacher):
            output = self.architecture.run_block(self.pruned, state)
            outputs = {part: self.maps[part](x) for part, (x, _) in pairs.items()}
        error = partial(relative_mse, whole=processes().sum)
        aligned = [
            error(self._rows(output, s).float(), self._rows(target, s).float())
            for s in self._streams()
        ]
        own = [error(outputs[part].float(), y.float()) for part, (_, y) in pairs.items()]
        return sum(aligned) + sum(own)

    def _streams(self) -> tuple[str, ...]:
        """Of the block's output that the projection changes; a text that nothing reads is left
        out."""
        if self.fit.kind == "text":
            return ("image", "text") if self.fit.steps else ("image",)
        return (self.fit.stream,)

    def _rows(self, state: BlockState, stream: str) -> torch.Tensor:
        rows = (
            counted(self.fit, state, self.used) if stream == self.fit.stream else state.real(stream)
        )
        return state.stream(stream)[rows]

    def _target(self, batch: int) -> BlockState:
        return self.states.state(self.fit.place.last + 1, batch)

    def _targets(self, batch: int) -> tuple[dict, dict | None]:
        """What each map reads and gives, and what the group's source left."""
        fit, source = self.fit, None
        _, seen = self.architecture.observe(self.plain, self.states.state(fit.place.index, batch))
        if self.source is not None:
            after, source = self.architecture.observe(
                self.source, self.states.state(fit.source.index, batch)
            )
            source = {"text": after.text, "text_modulated": source["text_modulated"]}
        target = self._target(batch)
        x, y = own_pair(fit, seen, source)
        real = counted(fit, target, self.used)
        pairs = {"map": (x[real], y[real])}
        if fit.steps:
            pairs["step"] = (
                source["text"][real],
                (target.text.float() - source["text"].float())[real],
            )
        return pairs, source

    def _block(self, job: _Work, place: Place) -> nn.Module:
        block = None if place.interval else self.teacher.block(place.index)
        return standing_block(self.teacher, job.students, place, block)

    def _projected(self, job: _Work) -> nn.Module:
        """A frozen block whose maps are the ones in training."""
        fit = self.fit
        ffn = (
            ()
            if fit.kind == "text"
            else (WidthSite(block=fit.place.index, kind=fit.kind, form=fit.form),)
        )
        source = fit.source.index if fit.source else None
        place = replace(fit.place, ffn=ffn, text_source=source, steps_text=fit.steps)
        block = project(self.architecture, twin(self.plain), place, {})
        names = self.architecture.projection_names[fit.kind]
        for part in projection_modules(self.architecture, block, fit.kind):
            parent, _, child = names[part].rpartition(".")
            setattr(block.get_submodule(parent), child, self.maps[part])
        return block
