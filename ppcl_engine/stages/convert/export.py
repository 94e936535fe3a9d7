"""Export: write the bundle (all variants, to be used with the user's base model), or one variant as a file
of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from ...architectures import Architecture
from ...architectures.folded import FOLDING
from ...models.assembly import empty_model, placed_block
from ...models.bundle import BUNDLE_SUFFIX, MAP_KEY, write_bundle
from ...models.bundle_contents import bundle_entries
from ...models.comfyui_names import marks_of
from ...models.layout import Place, layout_of
from ...models.standalone import hints_of, write_standalone
from ...models.stored_layout import HINTS_TENSOR
from ...models.storing import FP8_STORE, check_store
from ...models.surgery import empty_block
from ...models.teacher_hashes import teacher_hashes
from ...models.tensor_sources import (
    Source,
    comfyui_sources,
    write_gguf_sources,
    write_sources,
)
from ...models.weights import Weights
from ...plan import PruningPlan, Variant
from ...run import Run
from ...settings.convert_settings import ExportConfig
from ...system.atomic import write_json
from ...system.float8 import FP8, FP8_MARK
from ...system.gguf_files import GGUF_SUFFIX
from ...system.json_text import json_text
from ...system.tensor_files import OneAtATime
from ..inputs import open_plan
from ..run_students import RunStudents

SOURCE_PLAN_KEY = "ppcl_source_plan"


def export(config: ExportConfig) -> Path:
    """Returns the file (or diffusers folder). Raises ValueError for a variant that the layout cannot
    hold, and for students that are not trained yet."""
    check_store(config.layout, config.store)
    run, weights = Run(config.run), Weights(config.model)
    plan = open_plan(config, weights)
    folder = run.folder / "exports"
    if config.layout == "bundle":
        path = folder / f"{config.name}{BUNDLE_SUFFIX}"
        entries = list(bundle_entries(run, plan, config.store))
        write_bundle(path, plan, entries, teacher_hashes(weights))
        return path
    variant = plan.variant(config.variant)
    tensors = _tensors(run, weights, plan, variant)
    if config.layout == "ppcl":
        return write_standalone(
            folder / f"{config.name}.safetensors", tensors, plan, variant, config.store
        )
    return _write_stock(config, folder, weights, plan, variant, tensors)


def _write_stock(
    config: ExportConfig,
    folder: Path,
    weights: Weights,
    plan: PruningPlan,
    variant: Variant,
    tensors: dict[str, Source],
) -> Path:
    """A file that loads without this project: blocks counted from 0 without gaps."""
    _refuse_what_stock_lacks(plan, variant, config.layout)
    architecture = weights.architecture
    block_map = [place.index for place in layout_of(plan, variant).places]
    stock = architecture.with_blocks(weights.config, block_map)
    tensors = _renumbered(tensors, architecture, weights.config, stock, block_map)
    metadata = {MAP_KEY: json_text(block_map), SOURCE_PLAN_KEY: plan.to_json(), "format": "pt"}
    if config.layout == "diffusers":
        path = folder / config.name
        write_sources(path / "diffusion_pytorch_model.safetensors", tensors, config.store, metadata)
        write_json(path / "config.json", {"_class_name": architecture.diffusers_class, **stock})
        return path
    metadata["config"] = json_text(stock)
    extra = {
        **marks_of(architecture, stock),
        HINTS_TENSOR: hints_of(plan, block_map, stock),
    }
    tensors = comfyui_sources(architecture, tensors)
    if config.layout == "gguf":
        path = folder / f"{config.name}{GGUF_SUFFIX}"
        write_gguf_sources(path, architecture, tensors, config.store, metadata, extra)
        return path
    if config.store == FP8_STORE:
        # ComfyUI reads the marker's size: two elements say fp8 storage alone, products in 16 bits
        extra[FP8_MARK] = torch.zeros(2, dtype=FP8)
    path = folder / f"{config.name}.safetensors"
    write_sources(path, tensors, config.store, metadata, extra)
    return path


def _tensors(run: Run, weights: Weights, plan: PruningPlan, variant: Variant) -> dict[str, Source]:
    """Every tensor of the variant by its name in diffusers, with the teacher's indices. Each is read
    when it is written."""
    architecture, layout = weights.architecture, layout_of(plan, variant)
    students = RunStudents(run, weights.config, architecture)
    if variant.tuned:
        model = empty_model(architecture, weights.config, layout)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return {
            n: Source(s, lambda n=n: students.tuned(variant.name, n)) for n, s in shapes.items()
        }
    unchanged = {place.index for place in layout.places if place.is_teacher}
    replaced = tuple(
        architecture.block_prefix(weights.config, index)
        for index in range(plan.num_blocks)
        if index not in unchanged
    )
    sources = {
        key: Source(weights.shape(key), partial(_unrounded, weights, key))
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
        prefix + name: Source(tuple(t.shape), partial(read, place, name))
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
