"""Export: the bundle (every variant, with the user's own base), or one variant as a file of its
own."""

from __future__ import annotations

from functools import lru_cache
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
from ...models.surgery import empty_block
from ...models.teacher_hashes import teacher_hashes
from ...models.tensor_sources import Source, comfyui_sources, write_sources
from ...models.weights import Weights
from ...plan import PruningPlan, Variant
from ...run import Run
from ...settings.convert_settings import ExportConfig
from ...system.atomic import write_json
from ...system.float8 import FP8, FP8_MARK
from ...system.json_text import json_text
from ...system.machine import DTYPES
from ..inputs import RunStudents, open_plan

SOURCE_PLAN_KEY = "ppcl_source_plan"


def export(config: ExportConfig) -> Path:
    """Returns the file (or diffusers folder). Raises ValueError for a name that is a path, for a
    variant with corrections where the layout is a stock host's, and for students that were not
    trained yet."""
    scaled = config.store == "float8"
    if scaled and config.layout != "comfyui":
        raise ValueError(
            f"--store float8 is ComfyUI's scaled fp8, not for --layout {config.layout}; use --layout comfyui"
        )
    run, weights = Run(config.run), Weights(config.model)
    plan, dtype = open_plan(config, weights), torch.bfloat16 if scaled else DTYPES[config.store]
    folder = run.folder / "exports"
    if config.layout == "bundle":
        path = folder / f"{config.name}{BUNDLE_SUFFIX}"
        write_bundle(path, plan, list(bundle_entries(run, plan, dtype)), teacher_hashes(weights))
        return path
    variant = plan.variant(config.variant)
    tensors = _tensors(run, weights, plan, variant)
    if config.layout == "ppcl":
        return write_standalone(
            folder / f"{config.name}.safetensors", tensors, plan, variant, dtype
        )
    _refuse_what_stock_lacks(plan, variant, config.layout)
    block_map = _block_map(plan, variant)
    stock_config = weights.architecture.with_blocks(weights.config, block_map)
    tensors = _renumbered(tensors, weights.architecture, weights.config, stock_config, block_map)
    metadata = {MAP_KEY: json_text(block_map), SOURCE_PLAN_KEY: plan.to_json(), "format": "pt"}
    if config.layout == "comfyui":
        path = folder / f"{config.name}.safetensors"
        metadata["config"] = json_text(stock_config)
        extra = {
            **marks_of(weights.architecture, stock_config),
            HINTS_TENSOR: hints_of(plan, block_map, stock_config),
        }
        # of two: weights alone, products in more bits
        extra |= {FP8_MARK: torch.zeros(2, dtype=FP8)} if scaled else {}
        write_sources(
            path, comfyui_sources(weights.architecture, tensors), dtype, metadata, extra, scaled
        )
        return path
    path = folder / config.name
    write_sources(path / "diffusion_pytorch_model.safetensors", tensors, dtype, metadata)
    write_json(
        path / "config.json", {"_class_name": weights.architecture.diffusers_class, **stock_config}
    )
    return path


def _tensors(run: Run, weights: Weights, plan: PruningPlan, variant: Variant) -> dict[str, Source]:
    """Every tensor of the variant by diffusers' names, teacher indices kept; a changed place is
    read when it is due."""
    architecture, layout = weights.architecture, layout_of(plan, variant)
    students = RunStudents(run, weights.config, architecture)
    if variant.tuned:
        model = empty_model(architecture, weights.config, layout)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return {
            n: Source(s, lambda n=n: students.tuned(variant.name, n)) for n, s in shapes.items()
        }
    untouched = {place.index for place in layout.places if place.is_teacher}
    prefixes = {
        architecture.block_prefix(weights.config, index): index for index in range(plan.num_blocks)
    }
    sources = {}
    for key in weights.keys():
        if next((index for p, index in prefixes.items() if key.startswith(p)), None) in {
            None,
            *untouched,
        }:
            sources[key] = Source(weights.shape(key), lambda key=key: weights.read(key))

    @lru_cache(maxsize=1)  # tensors are written place by place
    def state(place: Place) -> dict[str, torch.Tensor]:
        return placed_block(weights, students, place, torch.float32, "cpu", {}).state_dict()

    for place in layout.places:
        if place.index not in untouched:
            sources |= _place_tensors(weights, place, state)
    return sources


def _place_tensors(weights: Weights, place: Place, state) -> dict[str, Source]:
    with torch.device("meta"):
        shapes = empty_block(weights.architecture, weights.config, place, {}).state_dict()
    prefix = weights.architecture.block_prefix(weights.config, place.index)
    return {
        prefix + name: Source(tuple(t.shape), lambda n=name: state(place)[n])
        for name, t in shapes.items()
    }


def _block_map(plan: PruningPlan, variant: Variant) -> list[int]:
    """Teacher indices of the blocks that are left."""
    gaps = {index for name in variant.intervals for index in plan.interval(name).blocks[1:]}
    return [index for index in range(plan.num_blocks) if index not in gaps]


def _renumbered(
    tensors: dict[str, Source],
    architecture: Architecture,
    config: dict,
    stock_config: dict,
    block_map: list[int],
) -> dict[str, Source]:
    """Blocks counted from 0 without gaps, as `stock_config` counts them."""
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
    if FOLDING in plan.config:
        raise ValueError(
            f"the model is folded, for which stock {layout} has no place; export with --layout ppcl, or unfold it first "
            "(ppcl fold --form off)"
        )
    if variant.sites:
        raise ValueError(
            f"variant {variant.name!r} has width site {variant.sites[0]}, for which stock {layout} has no place; "
            "export with --layout ppcl, or a variant without width sites"
        )
    corrected = [n for n in variant.intervals if plan.interval(n).correction != "none"]
    if corrected:
        raise ValueError(
            f"interval {corrected[0]} has a correction, for which stock {layout} has no place; "
            "distil with --correction none, or export with --layout ppcl"
        )
