"""Polish: students and projections together, on the final velocity, each step with a random subset
switched on.

What is not on is the teacher's own frozen block; gradients flow through it. Every subset stays a
model of its own, so plug and play is kept, and the parts learn to make up for each other's errors
(method: the mixed mode).
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch

from ...algorithms.distillation.losses import tuning_loss
from ...algorithms.distillation.quantization import NONE
from ...algorithms.distillation.sharding import write_whole
from ...algorithms.distillation.trainable import (
    TrainableParts,
    part_tensors,
    parts_at,
    projection_part,
    student_part,
)
from ...algorithms.distillation.trainer import rounding
from ...algorithms.distillation.tuning import (
    AveragedTrainer,
    check_can_shard,
    forget_if_stale,
    step_draw,
    tune,
    tuning_settings,
    walk_fills,
    walking,
)
from ...algorithms.distillation.walks import Chain, ChainBlock
from ...models.layout import Layout, layout_of, projections_of
from ...models.streaming import Teacher, run_blocks, run_chain
from ...plan import PruningPlan, Variant
from ...run import Run
from ...settings.prune_settings import PolishConfig
from ...system.atomic import write_text
from ...system.distributed import processes
from ...system.finite import checked_velocity
from ...system.tensor_files import file_mark
from ..inputs import open_calibration, open_plan, open_teacher
from ..run_students import RunStudents


def polish(config: PolishConfig) -> Path:
    """Writes `polished/`, which every later stage prefers to the parts it came from; those stay as
    they are.

    The plan loses its measured sizes (not fine-tuned variants), since they were measured on other
    parts. Goes on from what is there. Raises Diverged (a ValueError) with the last saved state
    kept, Stopped on Ctrl-C after saving.
    """
    check_can_shard(config)
    run, teacher = Run(config.run), open_teacher(config)
    calibration, plan = (
        open_calibration(config, teacher.weights),
        open_plan(config, teacher.weights),
    )
    variant = plan.variant(config.variant) if config.variant else plan.everything()
    _check_trains(plan, variant)
    students = RunStudents(run, teacher.config, teacher.architecture, polished=False)
    where = "meta" if walk_fills(config) else teacher.device
    parts = TrainableParts(plan, variant, teacher.architecture, students, where)
    sources = _sources(run, plan, variant)
    names = [*variant.intervals, *variant.sites]
    settings = tuning_settings(config, calibration, sources, parts=names, all_on=config.all_on)
    forget_if_stale(run.polish_state, settings)

    def begin(part: str) -> dict[str, torch.Tensor]:
        return part_tensors(plan, students, part, teacher.device)

    def chain_at(step: int) -> Chain:
        inputs = calibration.fresh(*step_draw(config, calibration, step))
        layout = layout_of(plan, subset(plan, variant, config, step))
        return subset_chain(teacher, parts, layout, inputs, rounding(config, step, config.steps))

    places = _places(plan, variant)
    with walking(parts, places, begin, config, run.states / "polish") as walk:
        trainer = AveragedTrainer(walk)
        before = tune(trainer, chain_at, config, run.polish_state, settings, "polish")
        if processes().any(
            before < config.steps or any(run.best(path) == path for path in sources)
        ):
            _write(run, plan, sources, trainer)
    return run.polished_parts


def subset(plan: PruningPlan, variant: Variant, config: PolishConfig, step: int) -> Variant:
    """What is on in this step: all of the variant, or each part with probability 1/2, something at
    least."""
    draw = random.Random(f"subset {config.seed} {step}")
    if draw.random() < config.all_on:
        return variant
    while True:
        chosen = replace(
            variant,
            intervals=tuple(name for name in variant.intervals if draw.random() < 0.5),
            sites=tuple(name for name in variant.sites if draw.random() < 0.5),
        )
        if _trained(layout_of(plan, chosen)):  # a site alone may be off for lack of its interval
            return chosen


def subset_chain(
    teacher: Teacher, parts: TrainableParts, layout: Layout, inputs: dict, bits: str = NONE
) -> Chain:
    """Its loss is the relative error of the final velocity. The blocks in front of all that is
    changed run once, as the teacher's."""
    architecture, last = teacher.architecture, teacher.num_blocks - 1
    changed = next(
        n for n, place in enumerate(layout.places) if not place.is_teacher or place.publishes
    )
    first = layout.places[changed].index
    with torch.no_grad():
        front = run_blocks(
            architecture, (b for _, b in teacher.walk(0, first - 1)), teacher.embed(inputs)
        )
        target = run_chain(
            architecture, teacher.outer, (b for _, b in teacher.walk(first, last)), front
        )
        checked_velocity(target)
    made = parts.blocks(layout, teacher)[changed:]
    return Chain(
        teacher=teacher,
        outer=teacher.outer,
        trains_outer=False,
        begin=lambda: front,
        blocks=[
            ChainBlock(make=make, parts=parts_at(place))
            for make, place in zip(made, layout.places[changed:], strict=True)
        ],
        error=lambda velocity: tuning_loss(velocity, target),
        bits=bits,
    )


def _trained(layout: Layout) -> bool:
    return any(not place.is_teacher for place in layout.places)


def _check_trains(plan: PruningPlan, variant: Variant) -> None:
    if variant.tuned:
        raise ValueError(
            f"variant {variant.name!r} was fine-tuned and has weights of its own; polish another"
        )
    if not _trained(layout_of(plan, variant)):
        raise ValueError(
            f"variant {variant.name!r} replaces nothing, so nothing is to be polished; name another"
        )


def _sources(run: Run, plan: PruningPlan, variant: Variant) -> dict[Path, str]:
    """The file of each part, and the prefix of its tensors in `TrainableParts`."""
    files = {run.student(name): student_part(name) for name in variant.intervals}
    return files | {
        run.projection(*at): projection_part(*at) for at in projections_of(plan, variant)
    }


def _places(plan: PruningPlan, variant: Variant) -> list[list[str]]:
    """The parts of each place: a student, projections, or both."""
    places = {name: [student_part(name)] for name in variant.intervals}
    for place, kind in projections_of(plan, variant):
        places.setdefault(place, []).append(projection_part(place, kind))
    return list(places.values())


def _write(run: Run, plan: PruningPlan, sources: dict[Path, str], trainer: AveragedTrainer) -> None:
    """The polished parts, and the plan without what was measured on others."""
    if processes().writes:
        tuned = tuple(v for v in plan.variants if v.tuned)
        write_text(run.plan, plan.with_parts(variants=tuned).to_json() + "\n")
    for path, part in sources.items():
        tensors = trainer.used(part)
        state = {f"weight.{name.removeprefix(part)}": t for name, t in tensors.items()}
        write_whole(run.polished(path), state, {"source": file_mark(path), "format": "pt"})
