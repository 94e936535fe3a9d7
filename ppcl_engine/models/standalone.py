"""One variant as a file of its own, in our layout: teacher indices kept, its structure inside, for
our loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..architectures import architecture_named
from ..plan import PruningPlan, Variant, plan_from_json
from ..system.json_text import json_text
from ..system.tensor_files import TensorFile
from .assembly import empty_model, filled
from .comfyui_names import read_part, variant_parts
from .layout import Layout, layout_of
from .surgery import empty_block
from .tensor_sources import Source, joined_sources, write_sources
from .weights import COMFYUI_PREFIX, STRUCTURE_TENSOR, as_tensor, object_in, open_layout, usual_name

GUARD_SHAPE = (0, 1)
STRUCTURE_KEY = "ppcl_structure"


def write_standalone(
    path: Path, sources: dict[str, Source], plan: PruningPlan, variant: Variant, dtype: torch.dtype
) -> Path:
    """ComfyUI's names, teacher indices, the structure as a tensor (hosts drop metadata), and a
    guard of an impossible shape: a stock host would build what this file has not, and leave out
    what it has, without a word."""
    structure = structure_of(plan, variant).to_json()
    architecture, layout = architecture_named(plan.architecture), layout_of(plan, variant)
    extra = {STRUCTURE_TENSOR: as_tensor(structure)}
    if guard := guard_name(plan, layout):
        extra[guard] = torch.zeros(GUARD_SHAPE, dtype=torch.uint8)
    named = joined_sources(sources, variant_parts(architecture, plan.config, layout, sources))
    write_sources(path, named, dtype, {STRUCTURE_KEY: structure, "format": "pt"}, extra)
    return path


def guard_name(plan: PruningPlan, layout: Layout) -> str | None:
    """The first tensor of the full model that the variant has not; a stock host looks for it."""
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
    """The plan of a file that holds this variant alone: everything in it is on."""
    sites = [s for name in layout_of(plan, variant).sites for s in plan.site(name).sites]
    kept = tuple(plan.intervals_of(variant))
    return replace(
        plan, intervals=kept, sites=tuple(replace(s, fitted=()) for s in sites), variants=()
    )


def hints_of(plan: PruningPlan, indices: list[int], config: dict) -> torch.Tensor:
    """Of a file that counts its blocks anew: which of the teacher's they are. For loaders that drop
    metadata, where LoRAs would land on wrong blocks."""
    return as_tensor({"indices": indices, "blocks": plan.num_blocks, "config": config})


def standalone_structure(path: Path) -> dict | None:
    """The structure tensor's content when `path` is a standalone in our own (non-stock) layout,
    also as a part of a checkpoint that ComfyUI saved."""
    if not path.is_file():
        return None
    file = TensorFile(path)
    name = next(
        (n for n in (STRUCTURE_TENSOR, COMFYUI_PREFIX + STRUCTURE_TENSOR) if n in file.entries),
        None,
    )
    if name is None or "config" in file.metadata:  # a full model that was folded has both
        return None
    return object_in(file.read(name), path)


def open_standalone(path: Path, structure: dict, dtype: torch.dtype, device: str) -> nn.Module:
    plan = plan_from_json(json_text(structure), path)
    model = empty_model(
        architecture_named(plan.architecture), plan.config, layout_of(plan, plan.everything())
    )
    return filled(model, standalone_reader(path, plan, model.state_dict()), dtype, device)


def standalone_reader(
    path: Path, plan: PruningPlan, keys: Iterable[str]
) -> Callable[[str], torch.Tensor]:
    """Gives a standalone's tensors by diffusers' names with teacher indices, `keys` being all of
    them. Raises ValueError where some are not there."""
    architecture, layout = architecture_named(plan.architecture), layout_of(plan, plan.everything())
    parts = variant_parts(architecture, plan.config, layout, keys)
    stored = {usual_name(architecture, name): place for name, place in open_layout(path)[0].items()}
    if missing := sorted({part.name for part in parts.values()} - stored.keys()):
        raise ValueError(
            f"{path} lacks {len(missing)} tensors, first {missing[0]}; copy, export or save it again"
        )
    return partial(read_part, stored, parts)
