"""What an exported file of one variant holds: its tensors by their names in the file, each read when it is
written, and what stands beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ..architectures import Architecture
from ..architectures.folded import FOLDING
from ..models.assembly import empty_model, placed_block
from ..models.bundle import MAP_KEY
from ..models.comfyui_names import marks_of
from ..models.layout import Place, layout_of
from ..models.standalone import hints_of, standalone_contents
from ..models.stored_layout import HINTS_TENSOR
from ..models.surgery import empty_block
from ..models.tensor_sources import Source, comfyui_sources
from ..models.weights import Weights
from ..plan import PruningPlan, Variant
from ..system.json_text import json_text
from ..system.tensor_files import OneAtATime
from .run_students import RunStudents

SOURCE_PLAN_KEY = "ppcl_source_plan"


@dataclass(frozen=True)
class Contents:
    """What a file holds."""

    sources: dict[str, Source]
    """by their names in it"""
    metadata: dict[str, str]
    extra: dict[str, torch.Tensor]
    """written as they are"""
    config: dict
    """the model's, as the file's readers count its blocks"""


def contents_of(
    layout: str,
    weights: Weights,
    plan: PruningPlan,
    variant: Variant,
    tensors: dict[str, Source],
) -> Contents:
    """tensors: those of `tensors_of`. Raises ValueError for a variant that the layout cannot hold."""
    if layout == "ppcl":
        return Contents(*standalone_contents(tensors, plan, variant), weights.config)
    _refuse_what_stock_lacks(plan, variant, layout)
    architecture = weights.architecture
    block_map = [place.index for place in layout_of(plan, variant).places]
    stock = architecture.with_blocks(weights.config, block_map)
    tensors = _renumbered(tensors, architecture, weights.config, stock, block_map)
    metadata = {MAP_KEY: json_text(block_map), SOURCE_PLAN_KEY: plan.to_json(), "format": "pt"}
    if layout == "diffusers":
        return Contents(tensors, metadata, {}, stock)
    metadata["config"] = json_text(stock)
    extra = {**marks_of(architecture, stock), HINTS_TENSOR: hints_of(plan, block_map, stock)}
    return Contents(comfyui_sources(architecture, tensors), metadata, extra, stock)


def tensors_of(
    weights: Weights, students: RunStudents, plan: PruningPlan, variant: Variant
) -> dict[str, Source]:
    """Every tensor of the variant by its name in diffusers, with the teacher's indices."""
    architecture, layout = weights.architecture, layout_of(plan, variant)
    if variant.tuned:
        model = empty_model(architecture, weights.config, layout)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return {
            n: Source(s, lambda n=n: students.tuned(variant.name, n), (n,))
            for n, s in shapes.items()
        }
    unchanged = {place.index for place in layout.places if place.is_teacher}
    replaced = tuple(
        architecture.block_prefix(weights.config, index)
        for index in range(plan.num_blocks)
        if index not in unchanged
    )
    sources = {
        key: Source(weights.shape(key), partial(_unrounded, weights, key), (key,))
        for key in weights.keys()
        if not key.startswith(replaced)
    }

    def changed(place: Place) -> dict[str, torch.Tensor]:
        return placed_block(weights, students, place, torch.float32, "cpu", {}).state_dict()

    read = OneAtATime(changed)
    for place in layout.places:
        if place.index not in unchanged:
            sources |= _place_tensors(weights, place, read)
    return sources


def _unrounded(weights: Weights, key: str) -> torch.Tensor:
    """A quantised tensor as the numbers that it stands for, to be rounded once, when it is written."""
    return weights.read(key, torch.float32 if weights.is_scaled(key) else None)


def _place_tensors(weights: Weights, place: Place, read: OneAtATime) -> dict[str, Source]:
    """The tensors of a block that is not the teacher's own, by place and name in `read`."""
    with torch.device("meta"):
        shapes = empty_block(weights.architecture, weights.config, place, {}).state_dict()
    prefix = weights.architecture.block_prefix(weights.config, place.index)
    return {
        prefix + name: Source(tuple(t.shape), partial(read, place, name), (prefix + name,))
        for name, t in shapes.items()
    }


def _renumbered(
    tensors: dict[str, Source],
    architecture: Architecture,
    config: dict,
    stock_config: dict,
    block_map: list[int],
) -> dict[str, Source]:
    """The same tensors with the blocks counted from 0 without gaps, as `stock_config` counts them."""
    prefixes = {
        architecture.block_prefix(config, old): architecture.block_prefix(stock_config, new)
        for new, old in enumerate(block_map)
    }
    renamed = {}
    for key, source in tensors.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        renamed[prefixes[prefix] + key.removeprefix(prefix) if prefix else key] = source
    return renamed


def _refuse_what_stock_lacks(plan: PruningPlan, variant: Variant, layout: str) -> None:
    """Raises ValueError if the variant needs something that a stock host does not have."""
    if FOLDING in plan.config:
        raise ValueError(
            f"the model is folded, which stock {layout} cannot run; export with --layout ppcl, or unfold it first "
            "(ppcl fold --form off)"
        )
    if variant.sites:
        raise ValueError(
            f"variant {variant.name!r} has width site {variant.sites[0]}, which stock {layout} cannot run; "
            "export with --layout ppcl, or a variant without width sites"
        )
    corrected = [n for n in variant.intervals if plan.interval(n).correction != "none"]
    if corrected:
        raise ValueError(
            f"interval {corrected[0]} has a correction, which stock {layout} cannot run; "
            "distil with --correction none, or export with --layout ppcl"
        )
