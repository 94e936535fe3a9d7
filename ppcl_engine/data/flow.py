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


def rescaled(guided: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
    """guided * |caption| / |guided|, token by token, as diffusers' QwenImagePipeline keeps the
    caption's norm."""
    return guided * (caption.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def euler(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    noise: torch.Tensor,
    timesteps: list[float],
    seen: Callable[[int, torch.Tensor, float], None] = lambda step, x, t: None,
) -> torch.Tensor:
    """From noise at t = 1 to a picture at t = 0, both among the timesteps.

    `seen` gets every step's number, the state before the step, and its t.
    """
    x = noise
    for step, (now, then) in enumerate(zip(timesteps, timesteps[1:], strict=False)):
        seen(step, x, now)
        x = euler_step(x, velocity(x, now), now, then)
    return x


def euler_step(x: torch.Tensor, velocity: torch.Tensor, now: float, then: float) -> torch.Tensor:
    return x + (then - now) * velocity
