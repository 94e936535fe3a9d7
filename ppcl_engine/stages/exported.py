"""What an exported file of one variant holds: its tensors by their names in the file, each read when it is
written, and what stands beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models.bundle import MAP_KEY
from ..models.comfyui_names import marks_of
from ..models.layout import layout_of
from ..models.standalone import hints_of, standalone_contents
from ..models.stock_files import SOURCE_PLAN_KEY, refuse_what_stock_lacks, renumbered
from ..models.stored_layout import HINTS_TENSOR
from ..models.tensor_sources import Source, comfyui_sources
from ..models.weights import Weights
from ..plan import PruningPlan, Variant
from ..system.json_text import json_text


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
    """tensors: those of `variant_sources`. Raises ValueError for a variant that the layout cannot hold."""
    if layout == "ppcl":
        return Contents(*standalone_contents(tensors, plan, variant), weights.config)
    refuse_what_stock_lacks(plan, variant, layout)
    architecture = weights.architecture
    block_map = [place.index for place in layout_of(plan, variant).places]
    stock = architecture.with_blocks(weights.config, block_map)
    tensors = renumbered(
        tensors, architecture, weights.config, block_map, stock, range(len(block_map))
    )
    metadata = {MAP_KEY: json_text(block_map), SOURCE_PLAN_KEY: plan.to_json(), "format": "pt"}
    if layout == "diffusers":
        return Contents(tensors, metadata, {}, stock)
    metadata["config"] = json_text(stock)
    extra = {
        **marks_of(architecture, stock),
        HINTS_TENSOR: hints_of(plan.num_blocks, block_map, stock),
    }
    return Contents(comfyui_sources(architecture, tensors), metadata, extra, stock)
