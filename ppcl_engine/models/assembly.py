"""diffusers' model of a layout, assembled from a teacher's blocks and trained parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import nn

from ..architectures import Architecture, SharedText
from ..plan import Interval, PruningPlan, Variant
from .filling import fill
from .layout import Layout, Place, layout_of
from .surgery import Edit, Made, build_student, project, pruned_blocks
from .weights import Weights


class Students(Protocol):
    """Where trained parts come from: a bundle, or a run folder. Each method raises ValueError for
    an untrained part."""

    def student(self, interval: Interval, dtype: torch.dtype, device: str) -> nn.Module: ...

    def projection(
        self, place: str, kind: str, dtype: torch.dtype, device: str
    ) -> dict[str, torch.Tensor]: ...

    def tuned(self, variant: str, key: str) -> torch.Tensor: ...


def assemble(
    weights: Weights,
    students: Students | None,
    layout: Layout,
    dtype: torch.dtype,
    device: str,
    teacher_block: Callable[[int, Edit], nn.Module] | None = None,
    made: Made | None = None,
) -> nn.Module:
    """diffusers' model of this layout, with the teacher's indices.

    `teacher_block` gives the blocks that stay; by default they are read into memory. `made`: as
    `pruned_blocks` has it.
    """

    def student(interval: Interval) -> nn.Module:
        if students is None:
            raise ValueError(
                f"{weights.path} is a full model, so it has no student for interval {interval.name}"
            )
        return students.student(interval, dtype, device)

    blocks = pruned_blocks(
        weights.architecture,
        layout,
        teacher_block or (lambda index, edit: edit(weights.block(index, dtype, device))),
        student,
        partial(students.projection, dtype=dtype, device=device) if students else None,
        made,
    )
    return weights.architecture.assemble(weights.outer(dtype, device), weights.config, blocks)


def placed_block(
    weights: Weights,
    students: Students,
    place: Place,
    dtype: torch.dtype,
    device: str,
    shared: dict[int, SharedText],
) -> nn.Module:
    """A new block for one place, with its trained weights."""
    projections = partial(students.projection, dtype=dtype, device=device)
    if place.interval:
        block = students.student(place.interval, dtype, device)
    else:
        block = weights.block(place.index, dtype, device)
    return project(weights.architecture, block, place, shared, projections)


def open_variant(
    weights: Weights,
    students: Students,
    plan: PruningPlan,
    variant: Variant,
    dtype: torch.dtype,
    device: str,
    teacher_block: Callable[[int, Edit], nn.Module] | None = None,
    made: Made | None = None,
) -> nn.Module:
    """The variant's model; a tuned variant is filled with its own weights. `made` is told of each
    place's block: before the next one is made, or of a tuned variant, when all are."""
    layout = layout_of(plan, variant)
    if not variant.tuned:
        return assemble(weights, students, layout, dtype, device, teacher_block, made)
    model = empty_model(weights.architecture, plan.config, layout)
    fill(model, partial(students.tuned, variant.name), dtype, device, f"variant {variant.name}")
    if made is None:
        return model
    for place in layout.places:
        prefix = weights.architecture.block_prefix(plan.config, place.index)
        made(place, model.get_submodule(prefix.rstrip(".")))
    return model


def empty_model(architecture: Architecture, config: dict, layout: Layout) -> nn.Module:
    """diffusers' model of this layout with blocks on the meta device, to be filled."""
    with torch.device("meta"):
        blocks = pruned_blocks(
            architecture,
            layout,
            lambda index, edit: edit(architecture.build_block(config, index)),
            lambda interval: build_student(architecture, config, interval),
        )
    return architecture.assemble(architecture.build_outer(config), config, blocks)
