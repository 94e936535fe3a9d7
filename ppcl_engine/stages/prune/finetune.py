"""Fine-tune: all parameters of one variant against the teacher's velocity (paper, section 3.5), and
the data.

The result is one more variant of the plan, with weights of its own; the one it came from stays as
it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...algorithms.distillation.losses import tuning_loss
from ...algorithms.distillation.quantization import NONE
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
from ...algorithms.distillation.walks import (
    OUTER,
    Chain,
    ChainBlock,
    Walk,
    velocities,
    walked_blocks,
)
from ...architectures import BlockState
from ...data.calibration import CalibrationSet
from ...models.assembly import block_tensors, hollow_variant, open_variant
from ...models.cost import STORED_BYTES, CostModel
from ...models.layout import Layout, Place, layout_of
from ...models.streaming import Teacher, embed_with, mixed_precision, teacher_velocity
from ...models.weights import parameter_count, stored_count
from ...plan import FULL, PruningPlan, Variant
from ...run import Run
from ...settings.prune_settings import FinetuneConfig
from ...system.atomic import write_text
from ...system.distributed import processes
from ...system.finite import checked_velocity
from ..inputs import open_calibration, open_plan, open_teacher
from ..run_students import RunStudents

SAMPLES = 64  # behind the damage of the result, as many as `variants` takes by default


def finetune(config: FinetuneConfig) -> Path:
    """Writes `tuned/<name>.safetensors`, weights and optimiser state, and the variant into the
    plan.

    Goes on from what is there. Raises Diverged (a ValueError) with the last saved state kept,
    Stopped on Ctrl-C after saving.
    """
    check_can_shard(config)
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
    opened = hollow_variant if walk_fills(config) else open_variant
    model = opened(teacher.weights, students, plan, source, torch.float32, teacher.device)
    parts = {part_of(teacher, place): place for place in layout.places}

    def begin(part: str) -> dict[str, torch.Tensor]:
        place = parts[part]
        return block_tensors(
            teacher.weights, students, source, place, torch.float32, teacher.device
        )

    def chain_at(step: int) -> Chain:
        return _chain(config, teacher, model, layout, calibration, step)

    places = [[OUTER], *([part] for part in parts)]
    with walking(model, places, begin, config, run.states / "finetune") as walk:
        before = tune(AveragedTrainer(walk), chain_at, config, path, settings, f"finetune {name}")
        if before < config.steps or name not in {v.name for v in plan.variants}:
            walk.use_averages()
            figures = _figures(teacher, plan, source, walk, calibration)
            tuned = replace(source, name=name, tuned=True, **figures)
            kept = tuple(v for v in plan.variants if v.name != name)
            if processes().writes:
                write_text(run.plan, plan.with_parts(variants=(*kept, tuned)).to_json() + "\n")
    return path


def variant_chain(
    teacher: Teacher,
    model: nn.Module,
    layout: Layout,
    begin: Callable[[], BlockState],
    error: Callable[[torch.Tensor], torch.Tensor],
    bits: str = NONE,
) -> Chain:
    """A pruned model with all that is in it."""
    blocks = [
        ChainBlock(make=partial(model.get_submodule, part.rstrip(".")), parts=(part,))
        for part in (part_of(teacher, place) for place in layout.places)
    ]
    return Chain(
        teacher=teacher,
        outer=model,
        trains_outer=True,
        begin=begin,
        blocks=blocks,
        error=error,
        bits=bits,
    )


def part_of(teacher: Teacher, place: Place) -> str:
    """The prefix of a block's tensors."""
    return teacher.architecture.block_prefix(teacher.config, place.index)


def _chain(
    config: FinetuneConfig,
    teacher: Teacher,
    model: nn.Module,
    layout: Layout,
    calibration: CalibrationSet,
    step: int,
) -> Chain:
    draw, bits = step_draw(config, calibration, step), rounding(config, step, config.steps)
    inputs = calibration.fresh(*draw)
    data = calibration.data_velocity(*draw).to(teacher.device) if config.data else None
    with torch.no_grad():
        target = teacher_velocity(teacher, inputs)

    def error(velocity: torch.Tensor) -> torch.Tensor:
        return tuning_loss(velocity, target, data, config.data)

    begin = partial(embed_with, teacher, model, inputs)
    return variant_chain(teacher, model, layout, begin, error, bits)


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
    teacher: Teacher, plan: PruningPlan, source: Variant, walk: Walk, calibration: CalibrationSet
) -> dict:
    """Size and FLOPs of the model, and its damage on the last samples of the calibration."""
    batches = max(1, round(SAMPLES / calibration.samples * len(calibration)))
    inputs, model = calibration.all_inputs()[-batches:], walk.module
    cost = CostModel.at(teacher.architecture, teacher.config, inputs[0])
    layout, sums = layout_of(plan, source), torch.zeros(2, dtype=torch.float64)
    for ours, target in zip(*_velocities(teacher, layout, walk, inputs), strict=True):
        error = (ours.double() - target.double()).square().sum()
        sums += torch.stack([error, target.double().square().sum()]).cpu()
    error, power = processes().sum(sums).tolist()
    size, flops = stored_count(model) * STORED_BYTES, cost.variant(plan, source).flops
    return {
        "parameters": parameter_count(model),
        "bytes": size,
        "flops": flops,
        "damage": error / power,
    }


def _velocities(
    teacher: Teacher, layout: Layout, walk: Walk, inputs: list[dict]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The velocities of the model, and the teacher's."""
    architecture, outer = teacher.architecture, walk.module
    states = walk.folder and walk.folder / "rows"
    with mixed_precision(teacher, cache=False), walk.filled((OUTER,)):
        embedded = [embed_with(teacher, outer, row) for row in inputs]
        chain = variant_chain(teacher, outer, layout, lambda: embedded[0], torch.sum)
        blocks = walked_blocks(walk, chain.blocks)
        ours = velocities(architecture, outer, blocks, embedded, states)
    whole = (block for _, block in teacher.walk(0, teacher.num_blocks - 1))
    embedded = [teacher.embed(row) for row in inputs]
    targets = velocities(architecture, teacher.outer, whole, embedded, states)
    return ours, [checked_velocity(target) for target in targets]
