"""Rectified flow: x_t = (1 - t) x_0 + t noise, velocity = noise - x_0 (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch


def noised(clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """clean, noise [n, tokens, channels], t [n] in [0, 1]"""
    return torch.lerp(clean, noise, t[:, None, None].to(clean.dtype))


def euler_timesteps(steps: int) -> list[float]:
    """1, ..., 0 in equal steps, both ends included."""
    return [1 - i / steps for i in range(steps + 1)]


def guided(empty: torch.Tensor, caption: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, equation 6)."""
    return empty + guidance * (caption - empty)


def euler(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    noise: torch.Tensor,
    steps: int,
    seen: Callable[[torch.Tensor, float], None] = lambda x, t: None,
) -> torch.Tensor:
    """From noise at t = 1 to a picture at t = 0; `seen` is shown every state before its step."""
    x = noise
    times = euler_timesteps(steps)
    for now, then in zip(times, times[1:], strict=False):
        seen(x, now)
        x = x + (then - now) * velocity(x, now)
    return x
