"""Fewer bits a weight: what int8, fp8 and int4 do to a weight, and training that sees it. Weights
alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ...architectures.linear_maps import linear_maps
from ...system.float8 import scaled_fp8

GROUP = 64  # neighbours of a row that share a scale in int4, as in its usual formats
BITS = {"fp8": 8, "int8": 8, "int4": 4}
NONE = "none"
LEAST = 1e-12


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """To the nearest of 2^bits - 1 equal steps around 0 that the largest weight of its row
    reaches."""
    most = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(-1, keepdim=True) / most).clamp_min(LEAST)
    return (weight / scale).round().clamp(-most, most) * scale


def simulated(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What is left of a weight [rows, columns]. fp8: a scale a matrix, as ComfyUI's; int8: a scale
    a row; int4: a scale for GROUP neighbours of a row, or a row where they do not divide it. Zeros
    stay zero. Raises ValueError for other kinds."""
    if kind not in BITS:
        raise ValueError(f"quantisation {kind!r} is unknown; known: {', '.join(BITS)}")
    if kind == "fp8":
        values, scale = scaled_fp8(weight)
        return (values.float() * scale).to(weight.dtype)
    if kind == "int4" and weight.shape[1] % GROUP == 0:
        return rounded(weight.reshape(len(weight), -1, GROUP), BITS[kind]).reshape(weight.shape)
    return rounded(weight, BITS[kind])


class _StraightThrough(torch.autograd.Function):
    """`simulated` forward, the identity backward."""

    @staticmethod
    def forward(context, weight: torch.Tensor, kind: str) -> torch.Tensor:
        return simulated(weight, kind)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


@contextmanager
def quantised_in_training(module: nn.Module, kind: str) -> Iterator[nn.Module]:
    """Meanwhile the module's linear maps, those that are trained, read what `kind` leaves of their
    weights; with NONE, the weights. Gradients reach the weights as if they had been read themselves
    (straight-through estimator, arXiv 1308.3432). Parameters, their names and their order stay, so
    nothing that is saved knows of it."""
    maps = (
        [m for m in linear_maps(module).values() if m.weight.requires_grad] if kind != NONE else []
    )
    # of a parameter, where a block was put together for one step
    views = [vars(m).get("weight") for m in maps]
    for linear in maps:
        # found before the parameter
        vars(linear)["weight"] = _StraightThrough.apply(linear.weight, kind)
    try:
        yield module
    finally:
        for linear, view in zip(maps, views, strict=True):
            del vars(linear)["weight"]
            if view is not None:
                vars(linear)["weight"] = view
