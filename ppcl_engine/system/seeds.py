"""The seeds of a run's random draws."""

from __future__ import annotations

import torch

STRIDE = 1_000_003
"""A prime above the number of draws that a run makes, so that two seeds share none of them."""


def draw_seed(seed: int, number: int) -> int:
    """The seed of draw `number` (a batch, a step, a picture) of a run with this seed."""
    return seed * STRIDE + number


def draw_generator(seed: int, number: int = 0) -> torch.Generator:
    """A generator on the CPU that starts with that draw's seed."""
    return torch.Generator().manual_seed(draw_seed(seed, number))
