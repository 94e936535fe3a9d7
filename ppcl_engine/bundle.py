"""Our files and the models they give: the bundle (students, projections, tuned variants) and the standalone.

A bundle holds, by teacher index: `students.<interval>.*`, `projections.<place>.<kind>.*`, and for every
fine-tuned variant all its tensors as `tuned.<variant>.*`; the plan is in the metadata.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from .architectures import Architecture, SharedText, architecture_named
from .architectures.folded import FOLDING
from .checkpoint import COMFYUI_PREFIX, STRUCTURE_TENSOR, Weights, object_in, open_layout, usual_name
from .comfyui_layout import read_part, variant_parts
from .files import TensorEntry, TensorFile, check_exists, write_tensor_stream
from .layout import Layout, Place, checked, full_layout, layout_of
from .plan import Interval, PruningPlan, Variant, plan_from_json
from .released import Released, is_width_pruned, repeated_steps_warning
from .surgery import Edit, build_student, filled_student, project, pruned_blocks

PLAN_KEY = "ppcl_plan"
MAP_KEY = "ppcl_block_map"
BUNDLE_SUFFIX = ".ppcl.safetensors"


class Students(Protocol):
    """Where trained parts come from: a bundle, or a run folder. Each raises ValueError for what was not trained."""

    def student(self, interval: Interval, dtype: torch.dtype, device: str) -> nn.Module: ...

    def projection(self, place: str, kind: str, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]: ...

    def tuned(self, variant: str, key: str) -> torch.Tensor: ...


class Bundle:
    """`*.ppcl.safetensors`, opened. Raises ValueError for a file without a plan."""

    def __init__(self, path: Path):
        self.file = TensorFile(path)
        if PLAN_KEY not in self.file.metadata:
            raise ValueError(f"{path} holds no pruning plan, so it is not a PPCL bundle")
        self.plan: PruningPlan = checked(plan_from_json(self.file.metadata[PLAN_KEY], path))
        self.architecture = architecture_named(self.plan.architecture)

    def student(self, interval: Interval, dtype: torch.dtype, device: str) -> nn.Module:
        state = self._under(student_prefix(interval), dtype, device)
        return filled_student(self.architecture, self.plan.config, interval, state)

    def projection(self, place: str, kind: str, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
        return self._under(projection_prefix(place, kind), dtype, device)

    def tuned(self, variant: str, key: str) -> torch.Tensor:
        return self.file.read(tuned_prefix(variant) + key)

    def _under(self, prefix: str, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
        names = [key.removeprefix(prefix) for key in self.file.keys() if key.startswith(prefix)]
        return {name: self.file.read(prefix + name).to(device, dtype) for name in names}


def student_prefix(interval: Interval) -> str:
    return f"students.{interval.name}."


def projection_prefix(place: str, kind: str) -> str:
    return f"projections.{place}.{kind}."


def tuned_prefix(variant: str) -> str:
    return f"tuned.{variant}."


def write_bundle(path: Path, plan: PruningPlan, entries: list[TensorEntry]) -> None:
    """entries: named by the prefixes above; memory holds one tensor at a time."""
    write_tensor_stream(path, entries, {PLAN_KEY: plan.to_json(), "format": "pt"})


def is_bundle(path: Path) -> bool:
    return Path(path).is_file() and PLAN_KEY in TensorFile(path).metadata


def assemble(
    weights: Weights,
    students: Students | None,
    layout: Layout,
    dtype: torch.dtype,
    device: str,
    teacher_block: Callable[[int, Edit], nn.Module] | None = None,
) -> nn.Module:
    """diffusers' model of this layout, teacher indices kept. `teacher_block` (default: read into memory) gives the
    blocks that stay."""
    blocks = pruned_blocks(
        weights.architecture,
        layout,
        teacher_block or (lambda index, edit: edit(weights.block(index, dtype, device))),
        lambda interval: students.student(interval, dtype, device),
        students and partial(students.projection, dtype=dtype, device=device),
    )
    return weights.architecture.assemble(weights.outer(dtype, device), weights.config, blocks)


def placed_block(
    weights: Weights, students: Students, place: Place, dtype: torch.dtype, device: str, shared: dict[int, SharedText]
) -> nn.Module:
    """What stands at one place, with its trained weights: a block of its own."""
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
) -> nn.Module:
    """The variant's model; a tuned one is filled with its own weights."""
    layout = layout_of(plan, variant)
    if not variant.tuned:
        return assemble(weights, students, layout, dtype, device, teacher_block)
    model = empty_model(weights.architecture, plan.config, layout)
    return _filled(model, partial(students.tuned, variant.name), dtype, device)


def _filled(model: nn.Module, read: Callable[[str], torch.Tensor], dtype: torch.dtype, device: str) -> nn.Module:
    """The model with every tensor read by its name."""
    model.load_state_dict({name: read(name).to(device, dtype) for name in model.state_dict()}, assign=True)
    return model.eval().requires_grad_(False)


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


def open_model(
    path: str | Path,
    variant: str | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    legacy_txt_proj: bool = False,
) -> nn.Module:
    """A model with the same forward as diffusers' class of its architecture.

    path: a bundle (then `base` is the teacher it was made from), a standalone file or folder of
    ours, a diffusers folder, one of the authors' width-pruned folders, a ComfyUI single file. variant: a name of
    the bundle's plan, "full", or intervals and sites as "3-4,8-10,text:51-59"; None is the smallest. base: also of
    a folded table, the file that it was folded from, for timesteps that it lacks.
    legacy_txt_proj: the authors' older meaning of a text projection (see `released`). Raises ValueError in one line.
    """
    path = Path(path)
    check_exists(path)
    if legacy_txt_proj and not is_width_pruned(path):
        raise ValueError(
            f"{path} is not one of the authors' width-pruned folders, so --legacy-txt-proj says nothing; leave it out"
        )
    if not is_bundle(path):
        if variant is not None:
            raise ValueError(f"{path} is not a bundle, so it has no variant {variant!r}; leave the variant out")
        if is_width_pruned(path):
            return _open_released(Released(path, legacy_txt_proj), dtype, device)
        structure = standalone_structure(path)
        if structure:
            return _with_base(_open_standalone(path, structure, dtype, device), base, path)
        weights = Weights(path)
        return _with_base(assemble(weights, None, full_layout(weights.num_blocks), dtype, device), base, path)
    if base is None:
        raise ValueError(f"{path} is a bundle: students only; give the base model it was made from as well")
    bundle, weights = Bundle(path), Weights(base)
    _check_folded_alike(bundle, weights)
    bundle.plan.check_teacher(weights.architecture.name, weights.fingerprint, base)
    return open_variant(weights, bundle, bundle.plan, bundle.plan.variant(variant), dtype, device)


def _check_folded_alike(bundle: Bundle, weights: Weights) -> None:
    ours, theirs = (config.get(FOLDING) for config in (bundle.plan.config, weights.config))
    if ours != theirs:
        said = [f"folded ({folding['form']})" if folding else "not folded" for folding in (ours, theirs)]
        raise ValueError(
            f"{bundle.file.path} is {said[0]}, {weights.path} is {said[1]}: they were not folded together; take the base that "
            "`ppcl fold` wrote beside the bundle, or the bundle and base as they were before"
        )


def _with_base(model: nn.Module, base: str | Path | None, path: Path) -> nn.Module:
    """A folded table gets what it lacks from the file that it was folded from."""
    if base is not None:
        from .folding_files import give_base  # reads all kinds of files, so it imports this module

        give_base(model, Path(base), path)
    return model


def architecture_of(path: Path) -> Architecture:
    """Of any file that `open_model` reads."""
    if is_bundle(path):
        return Bundle(path).architecture
    if is_width_pruned(path):
        return Released(path).architecture
    structure = standalone_structure(path)
    return architecture_named(structure["architecture"]) if structure else Weights(path).architecture


def standalone_structure(path: Path) -> dict | None:
    """The structure tensor's content when `path` is a standalone in our own (non-stock) layout, also as a part of a
    checkpoint that ComfyUI saved."""
    if not path.is_file():
        return None
    file = TensorFile(path)
    name = next((n for n in (STRUCTURE_TENSOR, COMFYUI_PREFIX + STRUCTURE_TENSOR) if n in file.entries), None)
    if name is None or "config" in file.metadata:  # a full model that was folded has both
        return None
    return object_in(file.read(name), path)


def _open_standalone(path: Path, structure: dict, dtype: torch.dtype, device: str) -> nn.Module:
    plan = plan_from_json(json.dumps(structure), path)
    model = empty_model(architecture_named(plan.architecture), plan.config, layout_of(plan, plan.everything()))
    return _filled(model, standalone_reader(path, plan, model.state_dict()), dtype, device)


def standalone_reader(path: Path, plan: PruningPlan, keys: Iterable[str]) -> Callable[[str], torch.Tensor]:
    """Gives a standalone's tensors by diffusers' names with teacher indices, `keys` being all of them. Raises ValueError
    where some are not there."""
    architecture, layout = architecture_named(plan.architecture), layout_of(plan, plan.everything())
    parts = variant_parts(architecture, plan.config, layout, keys)
    stored = {usual_name(architecture, name): place for name, place in open_layout(path)[0].items()}
    if missing := sorted({part.name for part in parts.values()} - stored.keys()):
        raise ValueError(f"{path} lacks {len(missing)} tensors, first {missing[0]}; copy, export or save it again")
    return partial(read_part, stored, parts)


def _open_released(released: Released, dtype: torch.dtype, device: str) -> nn.Module:
    if warning := repeated_steps_warning(released):
        warnings.warn(f"{released.path}: {warning}", stacklevel=3)
    return _filled(empty_model(released.architecture, released.config, released.layout), released.read, dtype, device)
