"""Fine-tune: all parameters of one variant against the teacher's velocity (paper, section 3.5), and
the data.

The result is one more variant of the plan, with weights of its own; the one it came from stays as
it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...algorithms.distillation.losses import tuning_loss
from ...algorithms.distillation.quantization import NONE
from ...algorithms.distillation.sharding import Units, units_on
from ...algorithms.distillation.trainable import PlacedBlock, run_made
from ...algorithms.distillation.trainer import rounding
from ...algorithms.distillation.tuning import (
    AveragedTrainer,
    forget_if_stale,
    step_draw,
    tune,
    tuning_settings,
)
from ...data.calibration import CalibrationSet
from ...models.assembly import open_variant
from ...models.cost import STORED_BYTES, CostModel
from ...models.layout import Layout, Place, layout_of
from ...models.streaming import Teacher, embed_with, mixed_precision, teacher_velocity
from ...models.weights import parameter_count, stored_count
from ...plan import FULL, PruningPlan, Variant
from ...run import Run
from ...settings.prune_settings import FinetuneConfig
from ...system.atomic import write_text
from ...system.distributed import processes
from ..inputs import open_calibration, open_plan, open_teacher
from ..run_students import RunStudents

SAMPLES = 64  # behind the damage of the result, as many as `variants` takes by default


def finetune(config: FinetuneConfig) -> Path:
    """Writes `tuned/<name>.safetensors`, weights and optimiser state, and the variant into the
    plan.

    Goes on from what is there. Raises Diverged (a ValueError) with the last saved state kept,
    Stopped on Ctrl-C after saving.
    """
    run, teacher = Run(config.run), open_teacher(config)
    calibration, plan = (
        open_calibration(config, teacher.weights),
        open_plan(config, teacher.weights),
    )
    source = plan.variant(config.variant)
    name = _new_name(config, plan, source)
    path, layout = run.tuned_variant(name), layout_of(plan, source)
    sources = list(_sources(run, source, layout))
    settings = tuning_settings(config, calibration, sources, variant=source.name, data=config.data)
    forget_if_stale(path, settings)
    students = RunStudents(run, teacher.config, teacher.architecture)
    model, units = _opened(teacher, students, plan, source)
    trainer = AveragedTrainer(model, config.weight_decay, config.ema)

    def loss_at(step: int) -> torch.Tensor:
        return _loss(config, teacher, model, layout, calibration, step, units)

    before = tune(trainer, loss_at, config, path, settings, f"finetune {name}")
    if before < config.steps or name not in {v.name for v in plan.variants}:
        model.load_state_dict(trainer.used())
        tuned = replace(
            source,
            name=name,
            tuned=True,
            **_figures(teacher, plan, source, model, calibration, units),
        )
        kept = tuple(v for v in plan.variants if v.name != name)
        if processes().writes:
            write_text(run.plan, plan.with_parts(variants=(*kept, tuned)).to_json() + "\n")
    return path


def _opened(
    teacher: Teacher, students: RunStudents, plan: PruningPlan, source: Variant
) -> tuple[nn.Module, Units]:
    """The model to train, and the units that its blocks are in; sharded, a tuned variant is in the
    host's memory first, as a whole."""
    units = units_on(teacher.device)

    def add(place: Place, block: nn.Module) -> None:
        units.add(place.name, [block])

    device = units.device_of_parts
    model = open_variant(teacher.weights, students, plan, source, torch.float32, device, made=add)
    units.finish(model)
    return model, units


def model_velocity(
    teacher: Teacher,
    model: nn.Module,
    layout: Layout,
    inputs: dict,
    checkpointing: bool = False,
    bits: str = NONE,
    units: Units | None = None,
) -> torch.Tensor:
    """Velocity [n, image_tokens, channels] of a pruned model, in the teacher's precision."""
    units = units or Units(teacher.device)

    def velocity() -> torch.Tensor:
        state = embed_with(teacher, model, inputs)
        blocks = _blocks(teacher, model, layout, units)
        state = run_made(teacher.architecture, blocks, state, checkpointing, bits)
        return teacher.architecture.finish(model, state)

    with mixed_precision(teacher):
        return units.step(velocity)


def _loss(
    config: FinetuneConfig,
    teacher: Teacher,
    model: nn.Module,
    layout: Layout,
    calibration: CalibrationSet,
    step: int,
    units: Units,
) -> torch.Tensor:
    draw, bits = step_draw(config, calibration, step), rounding(config, step, config.steps)
    inputs = calibration.fresh(*draw)
    data = calibration.data_velocity(*draw).to(teacher.device) if config.data else None
    with torch.no_grad():
        target = teacher_velocity(teacher, inputs)
    velocity = model_velocity(teacher, model, layout, inputs, config.checkpointing, bits, units)
    return tuning_loss(velocity, target, data, config.data)


def _blocks(teacher: Teacher, model: nn.Module, layout: Layout, units: Units) -> list[PlacedBlock]:
    prefixes = {
        place.name: teacher.architecture.block_prefix(teacher.config, place.index).rstrip(".")
        for place in layout.places
    }
    return [
        PlacedBlock(partial(model.get_submodule, prefix), units.within(name))
        for name, prefix in prefixes.items()
    ]


def _new_name(config: FinetuneConfig, plan: PruningPlan, source: Variant) -> str:
    name = config.name or f"{source.name}_tuned"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"--name {name!r}: letters, digits, '-' and '_' only")
    if name == FULL or name in {source.name, *(v.name for v in plan.variants if not v.tuned)}:
        raise ValueError(
            f"--name {name!r} is the name of a variant that must stay as it is; choose another"
        )
    return name


def _sources(run: Run, source: Variant, layout: Layout) -> Iterator[Path]:
    if source.tuned:
        yield run.tuned_variant(source.name)
        return
    for place in layout.places:
        if place.interval:
            yield run.best(run.student(place.name))
        for kind in place.projections:
            yield run.best(run.projection(place.name, kind))


@torch.no_grad()
def _figures(
    teacher: Teacher,
    plan: PruningPlan,
    source: Variant,
    model: nn.Module,
    calibration: CalibrationSet,
    units: Units,
) -> dict:
    """Size and FLOPs of the model, and its damage on the last samples of the calibration."""
    batches = max(1, round(SAMPLES / calibration.samples * len(calibration)))
    inputs = calibration.all_inputs()[-batches:]
    cost = CostModel.at(teacher.architecture, teacher.config, inputs[0])
    layout, error, power = layout_of(plan, source), 0.0, 0.0
    for row in inputs:
        target = teacher_velocity(teacher, row).double()
        velocity = model_velocity(teacher, model, layout, row, units=units).double()
        error += float((velocity - target).square().sum())
        power += float(target.square().sum())
    error, power = processes().sum(torch.tensor([error, power], dtype=torch.float64)).tolist()
    size, flops = stored_count(model) * STORED_BYTES, cost.variant(plan, source).flops
    return {
        "parameters": parameter_count(model),
        "bytes": size,
        "flops": flops,
        "damage": error / power,
    }
