"""One variant as a file of its own, in our layout for our loaders: teacher indices, and its
structure inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..architectures import architecture_named
from ..plan import PruningPlan, Variant, plan_from_value
from ..system.tensor_files import TensorFile
from .assembly import empty_model
from .comfyui_names import check_parts, read_part, variant_parts
from .filling import fill
from .layout import Layout, checked, layout_of
from .model_configs import check_model_config
from .scales import scales_of
from .stored_layout import STRUCTURE_TENSOR, as_tensor, common_prefix, object_in, open_layout
from .surgery import empty_block
from .tensor_sources import Source, joined_sources, write_sources
from .weights import usual_name

GUARD_SHAPE = (0, 1)
STRUCTURE_KEY = "ppcl_structure"
LEAST_TENSORS = 6  # that a block has, whatever its projections


def write_standalone(
    path: Path, sources: dict[str, Source], plan: PruningPlan, variant: Variant, dtype: torch.dtype
) -> Path:
    """Writes ComfyUI's names with teacher indices, the structure as a tensor (hosts drop metadata),
    and a guard of an impossible shape.

    Without the guard a stock host would build the blocks that are missing, and skip tensors that it
    does not know, silently.
    """
    structure = structure_of(plan, variant).to_json()
    architecture, layout = architecture_named(plan.architecture), layout_of(plan, variant)
    extra = {STRUCTURE_TENSOR: as_tensor(structure)}
    if guard := guard_name(plan, layout):
        extra[guard] = torch.zeros(GUARD_SHAPE, dtype=torch.uint8)
    named = joined_sources(sources, variant_parts(architecture, plan.config, layout, sources))
    write_sources(path, named, dtype, {STRUCTURE_KEY: structure, "format": "pt"}, extra)
    return path


def guard_name(plan: PruningPlan, layout: Layout) -> str | None:
    """The first tensor of the full model that the variant does not have; a stock host looks for
    it."""
    architecture, places = (
        architecture_named(plan.architecture),
        {place.index: place for place in layout.places},
    )
    for index in range(plan.num_blocks):
        with torch.device("meta"):
            full = architecture.build_block(plan.config, index).state_dict()
            own = (
                empty_block(architecture, plan.config, places[index], {}).state_dict()
                if index in places
                else {}
            )
        if vacated := sorted(full.keys() - own.keys()):
            prefix = architecture.block_prefix(plan.config, index)
            return architecture.to_comfyui(
                prefix + vacated[0], [prefix + name for name in full]
            ).name
    return None


def structure_of(plan: PruningPlan, variant: Variant) -> PruningPlan:
    """The plan of a file that holds only this variant: everything in it is on."""
    sites = [s for name in layout_of(plan, variant).sites for s in plan.site(name).sites]
    kept = tuple(plan.intervals_of(variant))
    return replace(
        plan, intervals=kept, sites=tuple(replace(s, fitted=()) for s in sites), variants=()
    )


def hints_of(plan: PruningPlan, indices: list[int], config: dict) -> torch.Tensor:
    """For a file that renumbers its blocks: their teacher indices. Loaders that drop metadata need
    them, or LoRAs would land on the wrong blocks."""
    return as_tensor({"indices": indices, "blocks": plan.num_blocks, "config": config})


def standalone_structure(path: Path) -> dict | None:
    """The structure tensor's content when `path` is a standalone in our own (non-stock) layout,
    also as part of a checkpoint that ComfyUI saved."""
    if not path.is_file():
        return None
    file = TensorFile(path)
    name = common_prefix(file.keys()) + STRUCTURE_TENSOR
    # a folded full model has both
    if name not in file.entries or "config" in file.metadata:
        return None
    return structure_in(file, name)


def structure_in(file: TensorFile, name: str) -> dict:
    """Raises ValueError, naming the file, for a structure that is not a plan."""
    values = object_in(file.read(name), file.path)
    plan = checked(plan_from_value(values, f"{file.path}: {STRUCTURE_TENSOR}"))
    check_model_config(plan.architecture, plan.config, file.path)
    return values


def check_standalone(path: Path, structure: dict) -> None:
    """Raises ValueError, naming the tensor, for one that is missing, of the wrong shape, or not of
    numbers."""
    _empty_standalone(path, structure)


def open_standalone(path: Path, structure: dict, dtype: torch.dtype, device: str) -> nn.Module:
    model, read = _empty_standalone(path, structure)
    return fill(model, read, dtype, device, path)


def _empty_standalone(
    path: Path, structure: dict
) -> tuple[nn.Module, Callable[[str], torch.Tensor]]:
    """The model to be filled, and the function that reads each of its tensors; all of them are
    there.

    Nothing is built from a plan with more blocks than the file has tensors for.
    """
    plan = plan_from_value(structure, path)
    architecture, layout = architecture_named(plan.architecture), layout_of(plan, plan.everything())
    held = len(TensorFile(path).entries)
    if LEAST_TENSORS * len(layout.places) > held:
        raise ValueError(
            f"{path} has {held} tensors, too few for the {len(layout.places)} blocks of its plan; copy or export it again"
        )
    model = empty_model(architecture, plan.config, layout)
    return model, standalone_reader(path, plan, model.state_dict())


def standalone_reader(
    path: Path, plan: PruningPlan, state: Mapping[str, torch.Tensor]
) -> Callable[[str], torch.Tensor]:
    """Reads a standalone's tensors by diffusers' names with teacher indices.

    `state`: all of them, only their shapes are used. Raises ValueError for one that is missing, of
    the wrong shape, or not of numbers.
    """
    architecture, layout = architecture_named(plan.architecture), layout_of(plan, plan.everything())
    parts = variant_parts(architecture, plan.config, layout, state)
    stored = {usual_name(architecture, name): place for name, place in open_layout(path)[0].items()}
    if missing := sorted({part.name for part in parts.values()} - stored.keys()):
        raise ValueError(
            f"{path} lacks {len(missing)} tensors, first {missing[0]}; copy, export or save it again"
        )
    scales = scales_of(stored, TensorFile(path).metadata, path)
    check_parts(
        stored, scales, parts, {name: tuple(tensor.shape) for name, tensor in state.items()}, path
    )
    return partial(read_part, stored, scales, parts)
