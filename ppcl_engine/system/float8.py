"""ComfyUI's scaled fp8 on disk: a matrix in fp8, its scale, and a tensor that marks the format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .tensor_files import MadeOnce, TensorEntry

FP8 = torch.float8_e4m3fn
FP8_MARK, FP8_SCALE = "scaled_fp8", ".scale_weight"  # as ComfyUI names them


def scaled_fp8(weight: torch.Tensor, dtype: torch.dtype = FP8) -> tuple[torch.Tensor, torch.Tensor]:
    """(values in `dtype`, scale float32 []), weight ~ values * scale: the largest weight becomes
    fp8's largest number."""
    scale = (weight.float().abs().max() / torch.finfo(dtype).max).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    return (weight.float() / scale).to(dtype), scale


def scaled_entries(
    key: str, shape: tuple[int, ...], read: Callable[[], torch.Tensor]
) -> list[TensorEntry]:
    scale = key.removesuffix(".weight") + FP8_SCALE
    parts = MadeOnce(lambda: dict(zip((key, scale), scaled_fp8(read()), strict=True)))
    return [
        TensorEntry(key, FP8, shape, partial(parts.take, key)),
        TensorEntry(scale, torch.float32, (), partial(parts.take, scale)),
    ]
