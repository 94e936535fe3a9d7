"""Adapt a LoRA: what it says of replaced blocks and FFNs, fitted to the students and projections that
stand for them.

The teacher with the LoRA and without it is walked once over the calibration set, a block at a time.
Behind every place that was pruned, low-rank pairs on its linear maps are fitted to the change that
the LoRA makes there, at several strengths. Blocks that nothing replaced keep what the file says of
them, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...algorithms.distillation.loop import Session, train_until
from ...algorithms.distillation.trainer import Trainer, saved_step
from ...algorithms.lora.fit import PlaceFit, begun_pairs
from ...algorithms.lora.needed import Names, Work, fitted_maps
from ...algorithms.lora.pairs import Pairs
from ...algorithms.lora.walk import STRENGTHS, TwoTeachers
from ...architectures.modules import AnyModule
from ...architectures.shapes import block_shapes
from ...models.assembly import block_tensors
from ...models.layout import Layout, Place, layout_of
from ...models.lora_files import LoraFile
from ...models.lora_kinds import LowRank
from ...models.lora_writing import ADAPTED, adapted_tensors, check_not_adapted
from ...models.streaming import Teacher
from ...models.surgery import empty_block
from ...plan import Variant
from ...run import Run
from ...settings.convert_settings import AdaptLoraConfig
from ...system.hashes import text_hash
from ...system.interruption import stop_on_interrupt
from ...system.json_text import json_text
from ...system.progress import Progress, saved
from ...system.tensor_files import TensorFile, file_mark, write_tensors
from ..inputs import open_calibration, open_plan, open_teacher
from ..run_students import RunStudents


def adapt_lora(config: AdaptLoraConfig) -> Path:
    """Writes `loras/<name>.safetensors`, by the teacher's block numbers; goes on from the places that
    are done.

    Raises ValueError for a LoRA that is not the full model's, or that changes nothing of what the
    variant replaced; Stopped on Ctrl-C after saving.
    """
    run, teacher = Run(config.run), open_teacher(config)
    plan = open_plan(config, teacher.weights)
    variant = plan.variant(config.variant)
    lora = LoraFile(config.lora, teacher.architecture, teacher.config)
    layout = layout_of(plan, variant)
    names = Names(teacher.architecture, teacher.config, lora)
    works = names.work(layout)
    check_not_adapted(lora, names.by_block, layout, teacher.architecture.sections(teacher.config))
    if not works:
        raise ValueError(
            f"{config.lora} changes nothing of what variant {variant.name!r} replaced, so there is nothing to "
            "adapt: load the file itself"
        )
    calibration = open_calibration(config, teacher.weights)
    settings = _settings(config, calibration.hash, plan.to_json(), variant)
    course = _Course(config, run, teacher, variant, layout, lora, names, works, settings)
    course.check()
    if not course.all_done:
        folder = run.states / "adapt-lora" if config.streamed else None
        walk = TwoTeachers(teacher, lora, calibration, course.base, folder)
        try:
            course.train(walk)
        finally:
            walk.store.clear()
    return _write(course, text_hash(plan.to_json()))


def _settings(config: AdaptLoraConfig, calibration: str, plan: str, variant: Variant) -> str:
    names = ("rank", "updates", "learning_rate", "warm_up", "dtype", "seed")
    about = {name: getattr(config, name) for name in names}
    return json_text(
        {
            **about,
            "lora": file_mark(config.lora),
            "calibration": calibration[:16],
            "plan": text_hash(plan)[:16],
            "variant": variant.name,
            "parts": [*variant.intervals, *variant.sites],
        }
    )


@dataclass
class _Course:
    """The fits of all places of one adaptation."""

    config: AdaptLoraConfig
    run: Run
    teacher: Teacher
    variant: Variant
    layout: Layout
    lora: LoraFile
    names: Names
    works: Sequence[Work]
    settings: str

    def check(self) -> None:
        """Raises ValueError for a rank that is larger than a map, before anything is computed."""
        for work in self.works:
            block, rank = self._empty(work.place), self._rank(work)
            for name in self._maps(block, work):
                linear = block.get_submodule(name)
                width = min(linear.in_features, linear.out_features)
                if rank > width:
                    raise ValueError(
                        f"rank {rank} is above the width of {name}, {width}: a pair has to be smaller than "
                        "its map; choose a smaller --rank"
                    )

    @property
    def all_done(self) -> bool:
        return all(self._step(work) == self.config.updates for work in self.works)

    def train(self, walk: TwoTeachers) -> None:
        """Walks the blocks once, and fits each place that is not done when the walk is behind it."""
        steps = self.config.updates
        done = sum(self._step(work) or 0 for work in self.works)
        waiting = {work.place.index: work for work in self.works if self._step(work) != steps}
        last = max(waiting)
        progress = Progress(
            total=steps * len(self.works), initial=done, desc="adapt-lora", unit="update"
        )
        with stop_on_interrupt() as asked, progress:
            session = Session(rates=self.config, steps=steps, progress=progress, stop_asked=asked)
            for place in self.layout.places:
                if place.index > last:
                    break
                walk.pass_by(place)
                work = waiting.get(place.index)
                if work is not None:
                    self._fit(work, walk, session)
                if place.publishes:
                    self._publish(place, walk)

    def _fit(self, work: Work, walk: TwoTeachers, session: Session) -> None:
        fit = self._opened(work)
        powers = walk.want(fit)
        path = self._path(work)
        if path.exists():
            trainer = Trainer(self._hollow_pairs(fit), weight_decay=0.0)
            trainer.restore(path)
        else:
            pairs, about = self._begun(fit, walk, powers)
            trainer = Trainer(pairs, weight_decay=0.0)
            trainer.about["fit"] = json_text(about)

        def save() -> None:
            trainer.save(path, self.settings)

        train_until(
            self.config.updates,
            trainer,
            lambda step: fit.loss(
                pairs_of(trainer), walk.goal(fit, powers, step % len(walk.items))
            ),
            f"place {work.name}",
            session,
            save,
        )
        reached = fit.mean_loss(pairs_of(trainer), walk.goals(fit, powers))
        trainer.about["reached"] = json_text(reached)
        save()
        saved()

    def _begun(
        self, fit: PlaceFit, walk: TwoTeachers, powers: list[dict[str, float]]
    ) -> tuple[Pairs, dict[str, float]]:
        """The best of three beginnings, and the mean loss of each: what the LoRA says of the first
        block (as a file that is not adapted), what it says of all of them summed, and the better of
        these with the last maps in closed form."""
        work, device = fit.work, self.teacher.device
        maps, rank = self._maps(fit.block, work), self._rank(work)
        blocks = self.names.blocks(work)
        begun: dict[str, Pairs] = {}
        for name, part in (("first", blocks[:1]), ("summed", blocks)):
            found = begun_pairs(self.names, fit.block, maps, rank, part, self.base)
            begun[name] = Pairs(found, rank, device)
        losses = {n: fit.mean_loss(p, walk.goals(fit, powers)) for n, p in begun.items()}
        best = begun[min(losses, key=lambda n: losses[n])]
        solved = fit.closed_form(best, walk.goals(fit, powers), rank)
        if solved:
            begun["closed"] = Pairs(best.replaced(solved), rank, device)
            losses["closed"] = fit.mean_loss(begun["closed"], walk.goals(fit, powers))
        return begun[min(losses, key=lambda n: losses[n])], losses

    def _publish(self, place: Place, walk: TwoTeachers) -> None:
        work = next((w for w in self.works if w.place.index == place.index), None)
        fit = self._opened(work or Work(place, (), ()))
        pairs = self._saved_pairs(fit) if work else Pairs({}, 1, self.teacher.device)
        walk.publish(fit, pairs)

    def pairs(self) -> dict[Work, dict[str, LowRank]]:
        """What was fitted, by place and name of the linear map in the block."""
        found = {}
        for work in self.works:
            fit = PlaceFit(self.teacher, self._empty(work.place), work, self.lora, self.base)
            pairs = self._saved_pairs(fit, "cpu")
            found[work] = {name: pairs.get(name) for name in pairs.names}
        return found

    def about(self) -> dict[str, dict[str, float]]:
        """Place -> mean losses: of its beginnings, and reached."""
        files = {work.name: TensorFile(self._path(work)) for work in self.works}
        return {
            name: {**file.about("fit"), "reached": float(file.text("reached"))}
            for name, file in files.items()
        }

    def base(self, key: str) -> torch.Tensor:
        return self.teacher.weights.read(key, torch.float32)

    def _opened(self, work: Work) -> PlaceFit:
        teacher = self.teacher
        students = RunStudents(self.run, teacher.config, teacher.architecture)
        block = self._empty(work.place)
        tensors = block_tensors(
            teacher.weights, students, self.variant, work.place, teacher.dtype, teacher.device
        )
        block.load_state_dict(tensors, assign=True)
        return PlaceFit(teacher, block.eval(), work, self.lora, self.base)

    def _empty(self, place: Place) -> AnyModule:
        with torch.device("meta"):
            return empty_block(self.teacher.architecture, self.teacher.config, place, {})

    def _maps(self, block: AnyModule, work: Work) -> tuple[str, ...]:
        architecture, config = self.teacher.architecture, self.teacher.config
        whole = block_shapes(architecture, config, work.place.index)
        return fitted_maps(architecture, block, dict(whole), work)

    def _rank(self, work: Work) -> int:
        return self.config.rank or self.names.rank(work)

    def _hollow_pairs(self, fit: PlaceFit, device: str = "") -> Pairs:
        """Pairs of the right shapes, to be restored."""
        maps = self._maps(fit.block, fit.work)
        linears = {name: fit.block.get_submodule(name) for name in maps}
        empty = {
            name: LowRank(torch.zeros(0, m.in_features), torch.zeros(m.out_features, 0), 1.0)
            for name, m in linears.items()
        }
        return Pairs(empty, self._rank(fit.work), device or self.teacher.device)

    def _saved_pairs(self, fit: PlaceFit, device: str = "") -> Pairs:
        trainer = Trainer(self._hollow_pairs(fit, device), weight_decay=0.0)
        trainer.restore(self._path(fit.work))
        return pairs_of(trainer)

    def _path(self, work: Work) -> Path:
        return self.run.lora_fit(self.config.name, work.name)

    def _step(self, work: Work) -> int | None:
        return saved_step(self._path(work), self.settings)


def pairs_of(trainer: Trainer) -> Pairs:
    assert isinstance(trainer.module, Pairs)
    return trainer.module


def _write(course: _Course, plan_hash: str) -> Path:
    """The file: the LoRA's own tensors without those of what was replaced, and the new pairs."""
    config, teacher = course.config, course.teacher
    dropped = list(course.names.dropped(course.layout, list(course.works)))
    tensors = course.lora.tensors_without(dropped)
    for work, pairs in course.pairs().items():
        tensors |= adapted_tensors(
            teacher.architecture, teacher.config, work.place, work.projections, pairs
        )
    about = {
        "variant": course.variant.name,
        "parts": [*course.variant.intervals, *course.variant.sites],
        "plan": plan_hash,
        "teacher": teacher.weights.fingerprint,
        "lora": file_mark(config.lora),
        "strengths": sorted(STRENGTHS),
        "losses": course.about(),
    }
    path = course.run.lora(config.name)
    write_tensors(
        path, tensors, {**course.lora.metadata, ADAPTED: json_text(about), "format": "pt"}
    )
    return path
