"""The trained parts that a loaded model holds, and the variants of it that they make.

A switchable model holds the teacher's blocks, each interval's student (`transformer_blocks.<first>.student`) and all
projections (`transformer_blocks.<n>.projections`). A variant patches the forward FUNCTIONS of blocks, on one branch of
the graph: weights stay where they are, and every branch shares them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ...ppcl_engine.layout import Layout, Place, layout_of
from ...ppcl_engine.plan import PruningPlan, Variant
from .blocks import PaddedModulation, Texts, project, view_of_block
from .structure import Structure

if TYPE_CHECKING:
    from ..modulations import Modulations

ATTACHMENT = "ppcl_variant"
FORWARD = "diffusion_model.transformer_blocks.{}.forward"


@dataclass
class Parts:
    """On the host's transformer as `ppcl`; the modules themselves are the transformer's. later: the modulations that a
    table is filled from."""

    structure: Structure
    texts: Texts
    later: Modulations | None = None

    @property
    def plan(self) -> PruningPlan | None:
        return self.structure.plan


class Route:
    """The forward of a block in a variant: of its student, of a projected view, or none. `source`: the place that its
    text reads from."""

    def __init__(self, transformer: nn.Module, place: Place | None, source: Place | None):
        self.transformer, self.place, self.source = transformer, place, source

    def __call__(self, *arguments, **named):
        if self.place is None:
            return _pass_through(*arguments, **named)
        block = block_at(self.transformer, self.place, self.source)
        if self.place.interval:
            return block(*arguments, **named)
        return block.forward(*arguments, **named)  # hooks of the block have run: this is its forward


def _pass_through(hidden_states, encoder_hidden_states, *_, **__):
    return encoder_hidden_states, hidden_states


def block_at(transformer: nn.Module, place: Place, source: Place | None) -> nn.Module:
    """What runs at a place of a variant, on the weights that are there; made anew for every call, so never stale."""
    block = _bare(transformer, place)
    if not place.projections and not place.publishes:
        return block
    maps = transformer.transformer_blocks[place.index].projections[place.name] if place.projections else {}
    text_source = _bare(transformer, source) if source else None
    return project(
        view_of_block(block), place, lambda kind, part: maps[kind][part], transformer.ppcl.texts, text_source
    )


def _bare(transformer: nn.Module, place: Place) -> nn.Module:
    block = transformer.transformer_blocks[place.index]
    return block.student if place.interval else block


def variant_of(model) -> Variant:
    """What a branch runs."""
    return model.attachments.get(ATTACHMENT, Variant(name="full"))


def with_variant(model, variant: Variant):
    """A clone of the host's patcher that runs this variant. Nothing is read and nothing copied."""
    transformer = model.model.diffusion_model
    layout = layout_of(transformer.ppcl.plan, variant)
    new = model.clone()
    for key in [key for key, patch in new.object_patches.items() if isinstance(patch, Route)]:
        del new.object_patches[key]
    places = {place.index: place for place in layout.places}
    for index in range(layout.num_blocks):
        place = places.get(index)
        if place is None or not place.is_teacher or place.publishes:
            source = place and places.get(place.text_source)
            new.add_object_patch(FORWARD.format(index), Route(transformer, place, source))
    new.set_attachments(ATTACHMENT, variant)
    return new


def size_of(transformer: nn.Module, layout: Layout | None) -> tuple[int, int]:
    """(parameters, bytes) of what a variant of a switchable model runs; of all there is without a layout."""
    if layout is None:
        return _total([_counted(p) for p in transformer.parameters()])
    found = [_counted(p) for name, p in transformer.named_parameters() if not name.startswith("transformer_blocks.")]
    places = {place.index: place for place in layout.places}
    for place in layout.places:
        block = view_of_block(block_at(transformer, place, places.get(place.text_source)))
        found += [_counted(p) for p in block.parameters()]
        found += [_unused(module) for module in block.children() if isinstance(module, PaddedModulation)]
    return _total(found)


def _total(found: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(count for count, _ in found), sum(size for _, size in found)


def _counted(parameter: nn.Parameter) -> tuple[int, int]:
    """(numbers, bytes); of a quantised tensor the shape says the numbers."""
    return math.prod(parameter.shape), parameter.nbytes


def _unused(modulation: PaddedModulation) -> tuple[int, int]:
    """Of the half that a view still holds, negative."""
    linear = modulation[1]
    share = 1 - 3 * modulation.width / linear.out_features
    whole = _total([_counted(p) for p in linear.parameters()])
    return -round(share * whole[0]), -round(share * whole[1])
