"""Checks that values are finite, before they are kept or learned from."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

BAD_MODEL = "its weights are damaged, or too large for this precision: download it again, or use --dtype float32"
BAD_PICTURE = "the VAE's weights are damaged, or too large for this precision: download it again"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; in one pass, without a copy (float8: with one)."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no smallest and largest value of its own
        tensor = tensor.to(torch.bfloat16)
    return all(math.isfinite(bound) for bound in tensor.detach().aminmax())


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that is not finite; None where all are."""
    return next((name for name, tensor in tensors.items() if not is_finite(tensor)), None)


def check_finite(tensors: Mapping[str, torch.Tensor], where: object, advice: str) -> None:
    """Raises ValueError, in one line, naming the first tensor that is not finite."""
    if (name := first_not_finite(tensors)) is not None:
        raise ValueError(f"{where}: {name} is not finite (NaN or infinity); {advice}")


def checked_velocity(velocity: torch.Tensor, of: object = "the full model") -> torch.Tensor:
    """The velocity, unchanged. Raises ValueError, naming whose it is, where it is not finite."""
    check_finite({"velocity": velocity}, of, BAD_MODEL)
    return velocity
