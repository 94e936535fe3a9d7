"""Linear maps with 8 bits a weight, for timing: fp8 that is cast when it is used, and int8 products.

fp8 as hosts run it by default: weights alone are in 8 bits, products in 16. int8: weights and inputs
are rounded, a scale a row of each, products are PyTorch's own int8 kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ppcl_engine.algorithms.distillation.quantization import LEAST

MOST = 127
ROWS = 32  # the kernel wants more than 16, older libraries a multiple of 4 or 8


class Float8Linear(nn.Linear):
    """Weights in fp8, without a scale, as the released qwen_image_fp8 has them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class Int8Linear(nn.Linear):
    """Weights in int8 with `scale` [outputs]; inputs are rounded when they come, a scale a token."""

    scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = int8_codes(rows)
        codes = F.pad(codes, (0, 0, 0, -len(rows) % ROWS))
        product = torch._int_mm(codes, self.weight.t())[: len(rows)]
        result = (product * scale * self.scale).to(x.dtype) + self.bias
        return result.reshape(*x.shape[:-1], self.out_features)


def int8_codes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [n, d] int8, scales [n, 1] float32): rows ~ codes * scales."""
    scale = (rows.abs().amax(-1, keepdim=True).float() / MOST).clamp_min(LEAST)
    return (rows / scale).round().clamp(-MOST, MOST).to(torch.int8), scale


def to_float8(linear: nn.Linear) -> None:
    _weight(linear, Float8Linear, linear.weight.to(torch.float8_e4m3fn))


def to_int8(linear: nn.Linear) -> None:
    codes, scale = int8_codes(linear.weight)
    _weight(linear, Int8Linear, codes)
    linear.register_buffer("scale", scale[:, 0])


def _weight(linear: nn.Linear, kind: type[nn.Linear], weight: torch.Tensor) -> None:
    """The map keeps being the same object: a text group's source has a hook on one of them."""
    linear.__class__ = kind
    linear.weight = nn.Parameter(weight, requires_grad=False)
