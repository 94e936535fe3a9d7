"""Scaled fp8 files: every matrix in fp8 with a scale of its own, and a tensor that says so."""

from __future__ import annotations

import torch

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def float8_of(mark: torch.Tensor) -> torch.dtype:
    """What a scaled file keeps matrices in: its mark says it by its own precision."""
    return mark.dtype if mark.dtype in FLOAT8 else FLOAT8[0]
