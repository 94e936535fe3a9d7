"""Export: the bundle (every variant, with the user's own base), or one variant as a file of its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..architectures import Architecture
from ..checkpoint import BUNDLE_SUFFIX, MAP_KEY, STRUCTURE_TENSOR, Weights, write_bundle
from ..config import ExportConfig
from ..files import TensorEntry, write_json, write_tensor_stream
from ..plan import Interval, PruningPlan, Variant
from ..run import DTYPES, Run, load_student_weights, open_plan

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
        write_bundle(path, plan, lambda interval: load_student_weights(run, interval), dtype)
        return path
    variant = plan.variant(config.variant)
    tensors = _tensors(run, weights, plan, variant)
    if config.layout == "ppcl":
        return _write_ppcl(folder / f"{config.name}.safetensors", tensors, weights, plan, variant, dtype)
    _refuse_corrections(plan, variant, config.layout)
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


def _tensors(run: Run, weights: Weights, plan: PruningPlan, variant: Variant) -> dict[str, _Source]:
    """Every tensor of the variant by diffusers' names, teacher indices kept."""
    architecture = weights.architecture
    intervals = [plan.interval(name) for name in variant.intervals]
    gone = tuple(architecture.block_prefix(index) for interval in intervals for index in interval.blocks)
    sources = {}
    for key in weights.keys():
        if not key.startswith(gone):
            sources[key] = _Source(weights.shape(key), lambda key=key: weights.read(key))
    for interval in intervals:
        students = load_student_weights(run, interval)
        for name, tensor in students.items():
            key = architecture.block_prefix(interval.first) + name
            sources[key] = _Source(tuple(tensor.shape), lambda i=interval, n=name: load_student_weights(run, i)[n])
    return sources


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


def _refuse_corrections(plan: PruningPlan, variant: Variant, layout: str) -> None:
    corrected = [n for n in variant.intervals if plan.interval(n).correction != "none"]
    if corrected:
        raise ValueError(
            f"interval {corrected[0]} has a correction, for which stock {layout} has no place; "
            "distil with --correction none, or export with --layout ppcl"
        )


def _write_ppcl(path: Path, tensors, weights: Weights, plan: PruningPlan, variant: Variant, dtype) -> Path:
    """Teacher indices, the structure as a tensor (hosts drop metadata), and a guard of an impossible shape."""
    intervals: tuple[Interval, ...] = tuple(plan.interval(name) for name in variant.intervals)
    structure = replace(plan, intervals=intervals, variants=()).to_json()
    encoded = torch.tensor(list(structure.encode()), dtype=torch.uint8)
    extra = {STRUCTURE_TENSOR: encoded, GUARD_TENSOR: torch.zeros(0, 1, dtype=torch.uint8)}
    _write(path, tensors, dtype, {STRUCTURE_KEY: structure, "format": "pt"}, extra)
    return path


def _write(path: Path, tensors: dict[str, _Source], dtype, metadata: dict[str, str], extra=None) -> None:
    bar = tqdm(total=len(tensors), desc="export", unit="tensor")

    def counted(source: _Source) -> torch.Tensor:
        bar.update()
        return source.read()

    entries = [TensorEntry(key, dtype, s.shape, lambda s=s: counted(s)) for key, s in tensors.items()]
    entries += [TensorEntry(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in (extra or {}).items()]
    with bar:
        write_tensor_stream(path, entries, metadata)
