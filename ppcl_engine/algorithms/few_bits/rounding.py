"""One block's matrices in every format that they may be stored in: their exact errors, and the block with
some of them rounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from ...architectures.modules import AnyModule
from ...models.storing import SHARED_SCALES, as_stored
from ..sparsity.compensation import inverse_factor
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


@dataclass(frozen=True, eq=False)
class ExactMatrix:
    """A matrix before it is rounded, with what its layers read."""

    weights: Mapping[str, torch.Tensor]
    """by layer, float64"""
    grams: Mapping[str, torch.Tensor]
    """by layer; the same tensor for layers that read the same"""

    @cached_property
    def largest(self) -> float:
        return max(float(weight.abs().max()) for weight in self.weights.values())

    @cached_property
    def factors(self) -> dict[str, torch.Tensor]:
        """By layer: of the inverse Gram matrix."""
        known: dict[int, torch.Tensor] = {}
        for gram in self.grams.values():
            if id(gram) not in known:
                known[id(gram)] = inverse_factor(gram)
        return {name: known[id(gram)] for name, gram in self.grams.items()}

    def rounded(self, store: str, refit: bool) -> RoundedMatrix:
        """refit: the weights that are not rounded yet make up for those that are, where that leaves
        a smaller error; formats with one scale a row stay as they are."""
        plain = self._as_read(self.weights, store)
        if not refit or store not in SHARED_SCALES:
            return plain
        fed = {}
        for name, weight in self.weights.items():
            rounded = partial(_columns_as_stored, store, largest=self.largest)
            fed[name] = fed_back(weight, self.factors[name], rounded, SHARED_SCALES[store])
        again = self._as_read(fed, store)
        return again if again.error < plain.error else plain

    def _as_read(self, written: Mapping[str, torch.Tensor], store: str) -> RoundedMatrix:
        """Rows are quantised together, as they lie in the file: nvfp4 has one scale for all of them."""
        rows = [len(weight) for weight in written.values()]
        parts = as_stored(store, torch.cat(list(written.values()))).double().split(rows)
        numbers = dict(zip(written, parts, strict=True))
        error = sum(
            layer_error(self.weights[name] - new, self.grams[name]) for name, new in numbers.items()
        )
        return RoundedMatrix(max(0.0, error), written, numbers)


def exact_matrix(block: AnyModule, grams: Grams, layers: Layers, where: str) -> ExactMatrix:
    """Raises ValueError for a layer that no calibration sample reaches."""
    weights = {name: block.get_submodule(name).weight.double() for name in layers}
    found: dict[str, torch.Tensor] = {}
    for name in layers:
        leader = grams.leaders.get(name, name)
        if leader not in found:
            found[leader] = grams.of(name, f"{where}, {name}")
    return ExactMatrix(weights, {name: found[grams.leaders.get(name, name)] for name in layers})


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
