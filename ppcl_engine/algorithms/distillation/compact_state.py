"""What an optimiser keeps between steps, in half of float32's bytes or less: moments in 8 bits with a
scale for each 256 of them (Dettmers et al., arXiv 2110.02861; float8 as in torchao's AdamWFp8),
averages in bfloat16."""

from __future__ import annotations

import torch

BLOCK = 256  # values with a scale of their own
SMALLEST = 4096  # values; smaller tensors stay as they are
CODES = torch.float8_e4m3fn
LARGEST, LEAST = 448.0, 2.0**-9  # of what the codes know, above 0
FULL, COMPACT = "float32", "compact"


def is_packed(shape: tuple[int, ...]) -> bool:
    number = torch.Size(shape).numel()
    return number >= SMALLEST and number % BLOCK == 0


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (torch.Size(shape).numel() // BLOCK,)


def pack(moment: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes of the same shape, scales [number / 256]) of a float32 tensor.

    Of a second moment (not signed) codes are of its root, which AdamW divides by: that halves the
    decades between small and large. A root never becomes 0, or its weight would be divided by
    AdamW's epsilon alone.
    """
    rows = (moment if signed else moment.sqrt()).reshape(-1, BLOCK)
    scales = rows.abs().amax(dim=1) / LARGEST
    scaled = rows / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    scaled = scaled if signed else scaled.clamp(min=LEAST)
    return scaled.to(CODES).view(moment.shape), scales


def unpack(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    values = (codes.float().view(-1, BLOCK) * scales[:, None]).view(codes.shape)
    return values if signed else values.square()


def rounded_at_random(values: torch.Tensor, seed: int) -> torch.Tensor:
    """float32 -> bfloat16, up or down so that the expectation is the value: a step of less than half
    a bfloat16 step would otherwise never be made."""
    generator = torch.Generator(values.device).manual_seed(seed)
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(
        1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32
    )
    return ((bits + noise) & ~0xFFFF).view(torch.float32).bfloat16()
