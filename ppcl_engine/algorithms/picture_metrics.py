"""How similar two pictures are: PSNR and structural similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ssim(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean structural similarity [n] of pictures [n, 3, H, W] in [0, 1], Gaussian window of 11 with
    deviation 1.5 (Wang et al. 2004, equation 13)."""
    channels = ours.shape[1]
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(channels, 1, 11, 11)
    x, y = ours.double(), theirs.double()

    def blurred(z: torch.Tensor) -> torch.Tensor:
        return F.conv2d(z, window, groups=channels)

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (value / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(1)


def psnr(ours: torch.Tensor, theirs: torch.Tensor, peak: float | None) -> torch.Tensor:
    """Decibels for each sample, at most 100; `peak` None takes the teacher's own range, since
    latents have no fixed one."""
    error = (ours - theirs).double().square().flatten(1).mean(1).clamp_min(1e-12)
    flat = theirs.double().flatten(1)
    span = flat.amax(1) - flat.amin(1) if peak is None else torch.full_like(error, peak)
    return (10 * (span.square() / error).log10()).clamp_max(100.0)
