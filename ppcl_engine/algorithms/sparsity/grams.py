"""What a block's linear maps read: weighted second moments over the calibration set, one block at a
time.

Products of a batch are float32, sums over batches float64. Maps that read the very same tensor
share one Gram matrix, so memory is that of a block's distinct inputs, whatever the number of
samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ...architectures import BlockState

EVEN, EARLY = "even", "early"
STEPS = 1000  # between which the logarithm falls


def timestep_weights(timestep: torch.Tensor, scheme: str) -> torch.Tensor:
    """[n], float64, for t in [0, 1] with noise at 1.

    even: 1. early: 1 + ln(1 + 999 t) / ln 1000, from 2 at the first step of drawing down to 1,
    because errors of early steps add up. That the weights fall logarithmically is from OBS-Diff
    (arXiv 2510.06751); the constants are ours.
    """
    t = timestep.double()
    return (
        torch.ones_like(t) if scheme == EVEN else 1 + (1 + (STEPS - 1) * t).log() / math.log(STEPS)
    )


@dataclass
class Grams:
    """The Gram matrices of a block's layers; `of` returns one when all batches were seen."""

    layers: dict[str, nn.Linear]
    """by name"""
    masked: Callable[[str], str | None]
    """the stream that a layer reads, where its inputs may be padding"""
    leaders: dict[str, str] = field(default_factory=dict)
    """layer -> the layer whose Gram matrix it shares"""
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """of the leaders: weighted sums of x x^T"""
    rows: dict[str, float] = field(default_factory=dict)
    """of the leaders: sums of the weights"""

    @contextmanager
    def watching(self, state: BlockState, weights: torch.Tensor) -> Iterator[None]:
        """Adds what the layers read while the block runs on this batch. weights [n]: of its
        samples."""
        # inputs are kept alive, so that no other tensor gets their ids
        seen: dict[int, tuple[torch.Tensor, str]] = {}
        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                hook = partial(self._read, name, state, weights, seen)
                hooks.callback(layer.register_forward_pre_hook(hook).remove)
            yield

    def of(self, name: str, where: str) -> torch.Tensor:
        """The weighted mean of x x^T, float64. Raises ValueError for a layer that read nothing, or
        only zeros."""
        leader = self.leaders.get(name, "")
        rows = self.rows.get(leader, 0.0)
        total = float(self.sums[leader].diagonal().sum()) if rows else 0.0
        if not math.isfinite(total):
            raise ValueError(
                f"{where}: its calibration inputs are not finite; calibrate again, or use --dtype float32"
            )
        if not total > 0:
            raise ValueError(
                f"{where} has no statistics: no calibration sample reaches it; calibrate with captions and pictures that do, "
                "or leave it dense with --skip"
            )
        return self.sums[leader] / rows

    def _read(
        self,
        name: str,
        state,
        weights,
        seen,
        module: nn.Linear,
        arguments: tuple[torch.Tensor, ...],
    ) -> None:
        x = arguments[0]
        _, leader = seen.setdefault(id(x), (x, name))
        if self.layers[leader].in_features != module.in_features:
            leader = name
        self.leaders[name] = leader
        if leader == name:
            self._add(
                name, x[..., : module.in_features], self._row_weights(name, x, state, weights)
            )

    def _row_weights(
        self, name: str, x: torch.Tensor, state: BlockState, weights: torch.Tensor
    ) -> torch.Tensor:
        """One weight for every row of x; 0 for padding. An edit model's conditioning has several
        rows a sample."""
        weights = weights.to(x.device).repeat(len(x) // len(weights))
        if x.ndim < 3:
            return weights
        weights = weights[:, None].expand(x.shape[:2])
        stream = self.masked(name)
        return weights * state.real(stream) if stream else weights

    def _add(self, name: str, x: torch.Tensor, weights: torch.Tensor) -> None:
        scaled = x.float().flatten(0, -2) * weights.sqrt().float().reshape(-1, 1)
        width = x.shape[-1]
        if name not in self.sums:
            self.sums[name] = torch.zeros(width, width, dtype=torch.float64, device=x.device)
        self.sums[name] += scaled.T @ scaled
        self.rows[name] = self.rows.get(name, 0.0) + float(weights.sum())
