"""The trained parts that a loaded model holds, and the variants of it that they make.

A switchable model holds the teacher's blocks, each interval's student (`<first block>.student`) and
all projections (`<block>.projections`). A variant patches the forward FUNCTIONS of blocks, on one
branch of the graph: weights stay where they are, and every branch shares them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ...ppcl_engine.models.layout import Layout, Place, layout_of
from ...ppcl_engine.plan import FULL, PruningPlan, Variant
from .base import Cut
from .blocks import Texts, project, view_of_block
from .folded import Basis, Table
from .modulations import Modulations
from .skipped_blocks import NoRoute
from .structure import Structure

ATTACHMENT = "ppcl_variant"
# where the host puts the variant of the branch that it loads
LOADED = "diffusion_model.ppcl.variant"


@dataclass
class PrunedState:
    """How a transformer of the host is pruned, kept in its attribute `ppcl`. The modules themselves
    are the transformer's."""

    structure: Structure
    texts: Texts
    folded: Basis | Table | None = None
    """what folded modulations read"""
    later: Modulations | None = None
    """the modulations that a table is filled from when a schedule is sampled"""
    variant: Variant = Variant(name=FULL)
    """of the branch that the host has loaded; the host itself patches it in"""
    refused: str = ""
    """why what is loaded cannot be saved; empty: it can"""

    @property
    def plan(self) -> PruningPlan | None:
        return self.structure.plan


class Route:
    """Stands for the forward of a block in a variant: runs the block's student, or a projected view
    of it. `source`: the place that its text reads from."""

    def __init__(self, transformer: nn.Module, place: Place, source: Place | None):
        self.transformer, self.place, self.source = transformer, place, source

    def __call__(self, *arguments, **named):
        block = block_at(self.transformer, self.place, self.source)
        if self.place.interval:
            return block(*arguments, **named)
        # hooks of the block have run: this is its forward
        return block.forward(*arguments, **named)


def block_at(transformer: nn.Module, place: Place, source: Place | None) -> nn.Module:
    """The module that runs at a place of a variant, on the weights that are loaded. It is made anew
    for every call, so that it always sees the block's current modules."""
    block = _bare(transformer, place)
    if not place.projections and not place.publishes:
        return block
    structure = transformer.ppcl.structure
    maps = (
        structure.block(transformer, place.index).projections[place.name]
        if place.projections
        else {}
    )
    view, text_source = (
        view_of_block(structure.host, block),
        _bare(transformer, source) if source else None,
    )
    return project(
        structure.host,
        view,
        place,
        lambda kind, part: maps[kind][part],
        transformer.ppcl.texts,
        text_source,
    )


def _bare(transformer: nn.Module, place: Place) -> nn.Module:
    block = transformer.ppcl.structure.block(transformer, place.index)
    return block.student if place.interval else block


def variant_of(model) -> Variant:
    """The variant that a branch runs."""
    return model.attachments.get(ATTACHMENT, Variant(name=FULL))


def with_variant(model, variant: Variant):
    """A clone of the host's patcher that runs this variant. Nothing is read and nothing copied."""
    new = model.clone()
    new.set_attachments(ATTACHMENT, variant)
    if ATTACHMENT not in new.callbacks.get(CallbacksMP.ON_CLONE, {}):
        new.add_callback_with_key(CallbacksMP.ON_CLONE, ATTACHMENT, _follow)
    route(new, variant)
    return new


def _follow(model, clone, *_, **__) -> None:
    """The host may clone onto a model of its own, loaded anew: for another GPU, or without dynamic
    memory."""
    if clone.model is not model.model:
        route(clone, variant_of(clone))


def route(new, variant: Variant) -> None:
    """Patches the blocks of the patcher's own model."""
    transformer = new.model.diffusion_model
    structure = transformer.ppcl.structure
    layout = layout_of(structure.plan, variant)
    for key in [
        key for key, patch in new.object_patches.items() if isinstance(patch, Route | NoRoute)
    ]:
        del new.object_patches[key]
    places = {place.index: place for place in layout.places}
    for index in range(layout.num_blocks):
        place = places.get(index)
        key = f"diffusion_model.{structure.prefix(index)}forward"
        if place is None:
            new.add_object_patch(key, NoRoute(structure.host.list_of(structure.config, index)))
        elif not place.is_teacher or place.publishes:
            new.add_object_patch(key, Route(transformer, place, places.get(place.text_source)))
    new.add_object_patch(LOADED, variant)


def size_of(transformer: nn.Module, layout: Layout | None) -> tuple[int, int]:
    """(parameters, bytes) of what a variant of a switchable model runs; without a layout, of the
    whole transformer."""
    if layout is None:
        return _total([_counted(p) for p in transformer.parameters()])
    host, config = transformer.ppcl.structure.host, transformer.ppcl.structure.config
    counts = [
        _counted(p) for name, p in transformer.named_parameters() if not host.block_name.match(name)
    ]
    places = {place.index: place for place in layout.places}
    for place in layout.places:
        block = view_of_block(host, block_at(transformer, place, places.get(place.text_source)))
        counts += [_counted(p) for p in block.parameters()]
        for site in place.ffn:
            cuts = host.cuts_at(config, site).items()
            counts += [
                _unused(_bare(transformer, place).get_submodule(name), cut) for name, cut in cuts
            ]
    return _total(counts)


def tensors_in(transformer: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a loaded model by name. In whatever form the host keeps them, each has the
    shape of the numbers that it stands for."""
    return dict(
        (
            *transformer.named_parameters(remove_duplicate=False),
            *transformer.named_buffers(remove_duplicate=False),
        )
    )


def _total(counts: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(count for count, _ in counts), sum(size for _, size in counts)


def _counted(parameter: nn.Parameter) -> tuple[int, int]:
    """(parameters, bytes). A quantised tensor's shape tells its parameters; its bytes include its
    scales."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return math.prod(parameter.shape), parameter.nbytes
    inner, _ = parameter.__tensor_flatten__()
    return math.prod(parameter.shape), sum(getattr(parameter, name).nbytes for name in inner)


def _unused(linear: nn.Module, cut: Cut) -> tuple[int, int]:
    """(parameters, bytes), negative, that a view still holds of a map but the place does not use."""
    counts = []
    for parameter in linear.parameters(recurse=False):
        share = 1 - cut.share(parameter.ndim)
        counts.append(tuple(-round(share * number) for number in _counted(parameter)))
    return _total(counts)
