"""Export: the bundle (every variant, with the user's own base), or one variant as a file of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from ..architectures import Architecture
from ..bundle import (
    BUNDLE_SUFFIX,
    MAP_KEY,
    STRUCTURE_TENSOR,
    empty_model,
    placed_block,
    projection_prefix,
    student_prefix,
    tuned_prefix,
    write_bundle,
)
from ..checkpoint import Weights
from ..config import ExportConfig
from ..files import TensorEntry, TensorFile, write_json, write_tensor_stream
from ..layout import Place, layout_of
from ..plan import PruningPlan, TextGroup, Variant
from ..run import DTYPES, Run, RunStudents, open_plan
from ..surgery import empty_block

GUARD_TENSOR = "ppcl_needs_its_node_pack"
STRUCTURE_KEY = "ppcl_structure"
SOURCE_PLAN_KEY = "ppcl_source_plan"


def export(config: ExportConfig) -> Path:
    """Returns the file (or diffusers folder). Raises ValueError for a name that is a path, for a variant with
    corrections where the layout is a stock host's, and for students that were not trained yet."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", config.name):
        raise ValueError(f"--name {config.name!r}: letters, digits, '-' and '_' only; --run says where it goes")
    run, weights = Run(config.run), Weights(config.model)
    plan, dtype = open_plan(config, weights), DTYPES[config.store]
    folder = run.folder / "exports"
    if config.layout == "bundle":
        path = folder / f"{config.name}{BUNDLE_SUFFIX}"
        write_bundle(path, plan, list(_bundle_entries(run, plan, dtype)))
        return path
    variant = plan.variant(config.variant)
    tensors = _tensors(run, weights, plan, variant)
    if config.layout == "ppcl":
        return _write_ppcl(folder / f"{config.name}.safetensors", tensors, weights, plan, variant, dtype)
    _refuse_what_stock_lacks(plan, variant, config.layout)
    tensors, block_map = _renumbered(tensors, weights.architecture, plan, variant)
    stock_config = weights.architecture.with_num_blocks(weights.config, len(block_map))
    metadata = {MAP_KEY: json.dumps(block_map), SOURCE_PLAN_KEY: plan.to_json(), "format": "pt"}
    if config.layout == "comfyui":
        to_comfyui = weights.architecture.to_comfyui
        path = folder / f"{config.name}.safetensors"
        metadata["config"] = json.dumps(stock_config)
        _write(path, {to_comfyui(key): read for key, read in tensors.items()}, dtype, metadata)
        return path
    path = folder / config.name
    _write(path / "diffusion_pytorch_model.safetensors", tensors, dtype, metadata)
    write_json(path / "config.json", {"_class_name": weights.architecture.diffusers_class, **stock_config})
    return path


class _Source:
    """A tensor to be read when it is written: from the teacher's file, or from a student's."""

    def __init__(self, shape: tuple[int, ...], read):
        self.shape, self.read = shape, read


def _bundle_entries(run: Run, plan: PruningPlan, dtype: torch.dtype) -> Iterator[TensorEntry]:
    """Every student, every projection (of the blocks that can stand at its place too), every tuned variant."""
    for interval in plan.intervals:
        yield from _saved(run.student(interval.name), student_prefix(interval), dtype, "distill-depth")
    natural = {place.index: place.name for place in layout_of(plan, plan.everything()).places}
    for site in plan.sites:
        names = [natural[site.block]] if site.block in natural else []
        for name in dict.fromkeys([*names, *site.fitted]):
            path = run.projection(name, site.kind)
            yield from _saved(path, projection_prefix(name, site.kind), dtype, "distill-width")
    for variant in plan.variants:
        if variant.tuned:
            yield from _saved(run.tuned_variant(variant.name), tuned_prefix(variant.name), dtype, "finetune")


def _saved(path: Path, prefix: str, dtype: torch.dtype, stage: str) -> Iterator[TensorEntry]:
    """The weights of a saved training, read when they are written."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; run {stage} first")
    file = TensorFile(path)
    for key in file.keys():
        if key.startswith("weight."):
            name = prefix + key.removeprefix("weight.")
            yield TensorEntry(name, dtype, file.shape(key), lambda key=key: file.read(key))


def _tensors(run: Run, weights: Weights, plan: PruningPlan, variant: Variant) -> dict[str, _Source]:
    """Every tensor of the variant by diffusers' names, teacher indices kept; a changed place is read when it is due."""
    architecture, layout = weights.architecture, layout_of(plan, variant)
    students = RunStudents(run, weights.config, architecture)
    if variant.tuned:
        model = empty_model(architecture, weights.config, layout)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return {n: _Source(s, lambda n=n: students.tuned(variant.name, n)) for n, s in shapes.items()}
    untouched = {place.index for place in layout.places if place.is_teacher}
    prefixes = {architecture.block_prefix(index): index for index in range(plan.num_blocks)}
    sources = {}
    for key in weights.keys():
        if next((index for p, index in prefixes.items() if key.startswith(p)), None) in {None, *untouched}:
            sources[key] = _Source(weights.shape(key), lambda key=key: weights.read(key))
    for place in layout.places:
        if place.index not in untouched:
            sources |= _place_tensors(weights, students, place)
    return sources


def _place_tensors(weights: Weights, students: RunStudents, place: Place) -> dict[str, _Source]:
    architecture = weights.architecture
    with torch.device("meta"):
        shapes = empty_block(architecture, weights.config, place, {}).state_dict()

    @lru_cache(maxsize=1)
    def state() -> dict[str, torch.Tensor]:
        return placed_block(weights, students, place, torch.float32, "cpu", {}).state_dict()

    prefix = architecture.block_prefix(place.index)
    return {prefix + name: _Source(tuple(t.shape), lambda n=name: state()[n]) for name, t in shapes.items()}


def _renumbered(tensors: dict[str, _Source], architecture: Architecture, plan: PruningPlan, variant: Variant):
    """Blocks counted from 0 without gaps, and the list of their teacher indices."""
    gaps = {index for name in variant.intervals for index in plan.interval(name).blocks[1:]}
    block_map = [index for index in range(plan.num_blocks) if index not in gaps]
    prefixes = {architecture.block_prefix(old): architecture.block_prefix(new) for new, old in enumerate(block_map)}
    renamed = {}
    for key, source in tensors.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        renamed[prefixes[prefix] + key.removeprefix(prefix) if prefix else key] = source
    return renamed, block_map


def _refuse_what_stock_lacks(plan: PruningPlan, variant: Variant, layout: str) -> None:
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


def _write_ppcl(path: Path, tensors, weights: Weights, plan: PruningPlan, variant: Variant, dtype) -> Path:
    """Teacher indices, the structure as a tensor (hosts drop metadata), and a guard of an impossible shape."""
    structure = structure_of(plan, variant).to_json()
    encoded = torch.tensor(list(structure.encode()), dtype=torch.uint8)
    extra = {STRUCTURE_TENSOR: encoded, GUARD_TENSOR: torch.zeros(0, 1, dtype=torch.uint8)}
    _write(path, tensors, dtype, {STRUCTURE_KEY: structure, "format": "pt"}, extra)
    return path


def structure_of(plan: PruningPlan, variant: Variant) -> PruningPlan:
    """The plan of a file that holds this variant alone: everything in it is on."""
    switches = [plan.site(name) for name in layout_of(plan, variant).sites]
    sites = [site for switch in switches for site in (switch.sites if isinstance(switch, TextGroup) else (switch,))]
    kept = tuple(plan.intervals_of(variant))
    return replace(plan, intervals=kept, sites=tuple(replace(s, fitted=()) for s in sites), variants=())


def _write(path: Path, tensors: dict[str, _Source], dtype, metadata: dict[str, str], extra=None) -> None:
    bar = tqdm(total=len(tensors), desc="export", unit="tensor")

    def counted(source: _Source) -> torch.Tensor:
        bar.update()
        return source.read()

    entries = [TensorEntry(key, dtype, s.shape, lambda s=s: counted(s)) for key, s in tensors.items()]
    entries += [TensorEntry(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in (extra or {}).items()]
    with bar:
        write_tensor_stream(path, entries, metadata)
