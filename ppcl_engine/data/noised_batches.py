"""Batches of clean latents, noised at timesteps that cover the whole schedule."""

from __future__ import annotations

import torch

from ..architectures import Architecture, Inputs
from . import flow
from .sampling import TextInputs, inputs_of


def spread_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """One timestep in each of `count` equal parts of (0, 1), in random order: the whole schedule is
    covered."""
    parts = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return parts[torch.randperm(count, generator=generator)]


def noised_batch(
    architecture: Architecture,
    latents: torch.Tensor,
    t: torch.Tensor,
    text: TextInputs,
    noise_seed: int,
) -> Inputs:
    clean = architecture.pack(latents)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(noise_seed))
    return inputs_of(flow.noised(clean, noise, t), t, text, architecture.grid(latents), clean)
