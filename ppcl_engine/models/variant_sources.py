"""A variant's tensors as they are written into a file, each read when its turn comes."""

from __future__ import annotations

from functools import partial

import torch

from ..plan import PruningPlan, Variant
from ..system.tensor_files import OneAtATime
from .assembly import Students, empty_model, placed_block
from .layout import Place, layout_of
from .surgery import empty_block
from .tensor_sources import Source
from .weights import Weights


def variant_sources(
    students: Students, weights: Weights, plan: PruningPlan, variant: Variant
) -> dict[str, Source]:
    """Every tensor of the variant by its name in diffusers, with the teacher's indices. Each is read
    when it is written."""
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
        key: Source(weights.shape(key), partial(unrounded, weights, key), (key,))
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


def unrounded(weights: Weights, key: str) -> torch.Tensor:
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
