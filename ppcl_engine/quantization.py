"""Fewer bits a weight: ComfyUI's scaled fp8, and what int8, fp8 and int4 do to a weight. Weights alone, nothing is fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

FP8 = torch.float8_e4m3fn
GROUP = 64  # neighbours of a row that share a scale in int4, as in its usual formats
BITS = {"fp8": 8, "int8": 8, "int4": 4}
FP8_MARK, FP8_SCALE = "scaled_fp8", ".scale_weight"  # as ComfyUI names them
LEAST = 1e-12


def scaled_fp8(weight: torch.Tensor, dtype: torch.dtype = FP8) -> tuple[torch.Tensor, torch.Tensor]:
    """(values in `dtype`, scale float32 []), weight ~ values * scale: the largest weight is fp8's largest number."""
    scale = (weight.float().abs().max() / torch.finfo(dtype).max).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight.float() / scale).to(dtype), scale


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """To the nearest of 2^bits - 1 equal steps around 0 that the largest weight of its row reaches."""
    most = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(-1, keepdim=True) / most).clamp_min(LEAST)
    return (weight / scale).round().clamp(-most, most) * scale


def simulated(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What is left of a weight [rows, columns]. fp8: a scale a matrix, as ComfyUI's; int8: a scale a row; int4: a scale for
    GROUP neighbours of a row, or a row where they do not divide it. Zeros stay zero. Raises ValueError for other kinds."""
    if kind not in BITS:
        raise ValueError(f"quantisation {kind!r} is unknown; known: {', '.join(BITS)}")
    if kind == "fp8":
        values, scale = scaled_fp8(weight)
        return (values.float() * scale).to(weight.dtype)
    if kind == "int4" and weight.shape[1] % GROUP == 0:
        return rounded(weight.reshape(len(weight), -1, GROUP), BITS[kind]).reshape(weight.shape)
    return rounded(weight, BITS[kind])


@dataclass(eq=False)
class TwoParts:
    """A tensor that is stored as two. It is read once; when the second part is taken, nothing is held."""

    read: Callable[[], torch.Tensor]
    split: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    @cached_property
    def _parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split(self.read())

    def take_first(self) -> torch.Tensor:
        return self._parts[0]

    def take_second(self) -> torch.Tensor:
        return self.__dict__.pop("_parts")[1]
