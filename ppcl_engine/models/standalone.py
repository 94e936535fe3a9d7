"""One variant as a file of its own, in our layout for our loaders: teacher indices, and its
structure inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..architectures import architecture_named
from ..plan import PruningPlan, Variant, plan_from_value
from ..system.gguf_files import is_gguf
from ..system.tensor_files import TensorFile
from .assembly import empty_model
from .comfyui_names import check_parts, read_part, variant_parts
from .filling import fill
from .layout import Layout, checked, layout_of
from .model_configs import check_model_config
from .scales import scales_of
from .stored_layout import (
    STRUCTURE_TENSOR,
    StoredTensors,
    as_tensor,
    common_prefix,
    object_in,
    open_layout,
)
from .surgery import empty_block
from .tensor_sources import Source, joined_sources, write_sources
from .weights import usual_name

GUARD_SHAPE = (0, 1)
STRUCTURE_KEY = "ppcl_structure"
LEAST_TENSORS = 6  # that a block has, whatever its projections


def write_standalone(
    path: Path,
    sources: dict[str, Source],
    plan: PruningPlan,
    variant: Variant,
    store: str,
    metadata: dict[str, str] | None = None,
    original: StoredTensors | None = None,
) -> Path:
    """Writes ComfyUI's names with teacher indices, the structure as a tensor (hosts drop metadata),
    and a guard of an impossible shape.

    Without the guard a stock host would build the blocks that are missing, and skip tensors that it
    does not know, silently. original: see `write_sources`.
    """
    named, about, extra = standalone_contents(sources, plan, variant)
    write_sources(path, named, store, {**(metadata or {}), **about}, extra, original)
    return path


def standalone_contents(
    sources: dict[str, Source], plan: PruningPlan, variant: Variant
) -> tuple[dict[str, Source], dict[str, str], dict[str, torch.Tensor]]:
    """(the tensors by their names in the file, its metadata, what is written beside them)"""
    structure = structure_of(plan, variant).to_json()
    architecture, layout = architecture_named(plan.architecture), layout_of(plan, variant)
    extra = {STRUCTURE_TENSOR: as_tensor(structure)}
    if guard := guard_name(plan, layout):
        extra[guard] = torch.zeros(GUARD_SHAPE, dtype=torch.uint8)
    named = joined_sources(sources, variant_parts(architecture, plan.config, layout, sources))
    return named, {STRUCTURE_KEY: structure, "format": "pt"}, extra


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


def hints_of(num_blocks: int, indices: list[int], config: dict) -> torch.Tensor:
    """For a file that renumbers its blocks: their teacher indices, of `num_blocks`. Loaders that drop
    metadata need them, or LoRAs would land on the wrong blocks."""
    return as_tensor({"indices": indices, "blocks": num_blocks, "config": config})


def is_standalone(path: Path) -> bool:
    """Whether it is a standalone in our own layout, also as part of a checkpoint that ComfyUI
    saved."""
    if not path.is_file() or is_gguf(path):
        return False
    file = TensorFile(path)
    # a folded full model has both
    return _structure_name(file) in file.entries and "config" not in file.metadata


def _structure_name(file: TensorFile) -> str:
    return common_prefix(file.keys()) + STRUCTURE_TENSOR


class Standalone:
    """A standalone, opened; `read` gives its tensors by diffusers' names with teacher indices.

    Raises ValueError, naming the file, for a structure that is not a plan, and for a tensor that is
    missing, of the wrong shape, or not of numbers.
    """

    kind = "standalone with teacher indices"

    def __init__(self, path: Path):
        self.path, self.file = path, TensorFile(path)
        values = object_in(self.file.read(_structure_name(self.file)), path)
        self.plan: PruningPlan = checked(plan_from_value(values, f"{path}: {STRUCTURE_TENSOR}"))
        self.config = check_model_config(self.plan.architecture, self.plan.config, path)
        self.architecture = architecture_named(self.plan.architecture)
        self.num_blocks, self.fingerprint = self.plan.num_blocks, self.plan.fingerprint
        self.layout = layout_of(self.plan, self.plan.everything())
        self.read = self._reader()

    def model(self, dtype: torch.dtype, device: str) -> nn.Module:
        empty = empty_model(self.architecture, self.config, self.layout)
        return fill(empty, self.read, dtype, device, self.path)

    def _reader(self) -> Callable[[str], torch.Tensor]:
        held, blocks = len(self.file.entries), len(self.layout.places)
        if LEAST_TENSORS * blocks > held:  # nothing is built from such a plan
            raise ValueError(
                f"{self.path} has {held} tensors, too few for the {blocks} blocks of its plan; copy or export it again"
            )
        with torch.device("meta"):
            state = empty_model(self.architecture, self.config, self.layout).state_dict()
        parts = variant_parts(self.architecture, self.config, self.layout, state)
        stored = {
            usual_name(self.architecture, name): place
            for name, place in open_layout(self.path)[0].items()
        }
        if missing := sorted({part.name for part in parts.values()} - stored.keys()):
            raise ValueError(
                f"{self.path} lacks {len(missing)} tensors, first {missing[0]}; copy, export or save it again"
            )
        scales = scales_of(stored, self.file.metadata, self.path)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        check_parts(stored, scales, parts, shapes, self.path)
        return partial(read_part, stored, scales, parts)
