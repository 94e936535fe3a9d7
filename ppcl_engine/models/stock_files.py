"""Files that load without this project: blocks counted from 0 without gaps, for stock ComfyUI,
diffusers and ComfyUI-GGUF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..architectures import Architecture
from ..architectures.folded import FOLDING
from ..plan import PruningPlan, Variant
from ..system.atomic import write_json
from ..system.float8 import FP8, FP8_MARK
from ..system.gguf_files import GGUF_SUFFIX
from ..system.json_text import json_text
from .bundle import MAP_KEY
from .comfyui_names import marks_of
from .standalone import hints_of
from .stored_layout import HINTS_TENSOR, StoredTensors
from .storing import FP8_STORE
from .tensor_sources import (
    EVERYWHERE,
    Source,
    comfyui_sources,
    write_gguf_sources,
    write_sources,
)

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


def stock_contents(
    layout: str,
    architecture: Architecture,
    config: dict,
    indices: list[int] | None,
    sources: dict[str, Source],
    metadata: dict[str, str],
) -> Contents:
    """config: the teacher's. indices: of the teacher's blocks that the model has, by which `sources`
    are numbered; None for a full model, whose file says nothing of it."""
    stock, tensors, hints = config, sources, {}
    metadata = {**metadata, "format": "pt"}
    if indices is not None:
        stock = architecture.with_blocks(config, indices)
        tensors = renumbered(sources, architecture, config, indices, stock, range(len(indices)))
        metadata = {MAP_KEY: json_text(indices), **metadata}
        hints[HINTS_TENSOR] = hints_of(architecture.num_blocks(config), indices, stock)
    if layout == "diffusers":
        return Contents(tensors, metadata, {}, stock)
    metadata["config"] = json_text(stock)
    extra = {**marks_of(architecture, stock), **hints}
    return Contents(comfyui_sources(architecture, tensors), metadata, extra, stock)


def write_contents(
    path: Path,
    layout: str,
    store: str,
    architecture: Architecture,
    contents: Contents,
    original: StoredTensors | None = None,
    stores: Mapping[str, str] = EVERYWHERE,
) -> Path:
    """Returns the file (or diffusers folder). path: without ending. original, stores: see
    `write_sources`."""
    sources, metadata, extra = contents.sources, contents.metadata, contents.extra
    if layout == "diffusers":
        write_sources(path / "diffusion_pytorch_model.safetensors", sources, store, metadata)
        about = {"_class_name": architecture.diffusers_class, **contents.config}
        write_json(path / "config.json", about)
        return path
    if layout == "gguf":
        path = path.with_name(f"{path.name}{GGUF_SUFFIX}")
        write_gguf_sources(path, architecture, sources, store, metadata, extra, stores)
        return path
    if store == FP8_STORE:
        # ComfyUI reads the marker's size: two elements say fp8 storage alone, products in 16 bits
        extra = {**extra, FP8_MARK: torch.zeros(2, dtype=FP8)}
    path = path.with_name(f"{path.name}.safetensors")
    write_sources(path, sources, store, metadata, extra, original, stores)
    return path


def renumbered(
    tensors: dict[str, Source],
    architecture: Architecture,
    config: dict,
    indices: Sequence[int],
    new_config: dict,
    new_indices: Sequence[int],
) -> dict[str, Source]:
    """The same tensors with the blocks `indices` of `config` as the blocks `new_indices` of
    `new_config`."""
    prefixes = {
        architecture.block_prefix(config, old): architecture.block_prefix(new_config, new)
        for old, new in zip(indices, new_indices, strict=True)
    }
    renamed = {}
    for key, source in tensors.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        renamed[prefixes[prefix] + key.removeprefix(prefix) if prefix else key] = source
    return renamed


def refuse_what_stock_lacks(plan: PruningPlan, variant: Variant, layout: str) -> None:
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
