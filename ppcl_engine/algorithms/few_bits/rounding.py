"""One block's matrices in every format that they may be stored in: their exact errors, and the block with
some of them rounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ...architectures.modules import AnyModule
from ...models.storing import SHARED_SCALES, as_stored
from ..sparsity.grams import Grams
from ..sparsity.layer import layer_error
from .feedback import fed_back

Layers = tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """A matrix that a file holds in one piece."""

    layers: Layers
    """names of the block's linear maps whose rows it is made of"""
    sizes: Mapping[str, int]
    """store -> its bytes in the file"""


@dataclass(frozen=True)
class RoundedMatrix:
    """A matrix as it would be stored."""

    error: float
    """tr(D G D^T) with D the change of the weights: the mean squared change of what it gives"""
    weights: Mapping[str, torch.Tensor]
    """by layer: what is written"""
    numbers: Mapping[str, torch.Tensor]
    """by layer: what is read again"""


def rounded_matrix(
    block: AnyModule, grams: Grams, layers: Layers, store: str, refit: bool, where: str
) -> RoundedMatrix:
    """refit: the weights that are not rounded yet make up for those that are, where that leaves a
    smaller error; formats with one scale a row stay as they are."""
    weights = {name: block.get_submodule(name).weight.double() for name in layers}
    matrices = {name: grams.of(name, f"{where}, {name}") for name in layers}
    plain = _as_read(weights, weights, matrices, store)
    if not refit or store not in SHARED_SCALES:
        return plain
    largest = max(float(weight.abs().max()) for weight in weights.values())
    fed = {
        name: fed_back(
            weight,
            matrices[name],
            lambda part: _columns_as_stored(store, part, largest),
            SHARED_SCALES[store],
        )
        for name, weight in weights.items()
    }
    again = _as_read(fed, weights, matrices, store)
    return again if again.error < plain.error else plain


def _as_read(written, exact, matrices, store: str) -> RoundedMatrix:
    """Rows are quantised together, as they lie in the file: nvfp4 has one scale for all of them."""
    rows = [len(weight) for weight in written.values()]
    numbers = as_stored(store, torch.cat(list(written.values()))).double().split(rows)
    errors = [
        layer_error(exact[name] - new, matrices[name])
        for name, new in zip(written, numbers, strict=True)
    ]
    return RoundedMatrix(max(0.0, sum(errors)), written, dict(zip(written, numbers, strict=True)))


def _columns_as_stored(store: str, part: torch.Tensor, largest: float) -> torch.Tensor:
    """Some columns of a matrix whose largest weight is `largest`. nvfp4's second scale is made of it, so
    a block of columns that has it stands beside them."""
    count, part = part.shape[1], part.clamp(-largest, largest).float()
    if store == "nvfp4":
        anchor = torch.zeros_like(part)
        anchor[0, 0] = largest
        part = torch.cat([part, anchor], 1)
    return as_stored(store, part)[:, :count]


@contextmanager
def numbers_in(block: AnyModule, numbers: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[None]:
    """The block has other weights in some of its layers. It is no copy: a copy of a block that hands its
    text on would hand it to nobody."""
    exact = {}
    for by_layer in numbers:
        for name, weight in by_layer.items():
            layer = block.get_submodule(name)
            exact[name] = layer.weight
            layer.weight = nn.Parameter(weight.to(exact[name].dtype), requires_grad=False)
    try:
        yield
    finally:
        for name, weight in exact.items():
            block.get_submodule(name).weight = weight
