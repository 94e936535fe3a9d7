"""The best weights on a given mask: least squares by conjugate gradients, all rows at once, never worse than the start.

SparseGPT settles columns from left to right, so those on the right make up for all others and for their own errors alone;
with the mask given beforehand the exact minimum is within reach (Boža 2024, arXiv 2401.02938, solves it by ADMM).
"""

from __future__ import annotations

import torch

from .obs import DAMPING

MOST_STEPS = 32
ENOUGH = 1e-4  # of the first residual, squared


def refitted(weight: torch.Tensor, gram: torch.Tensor, stays: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """W' with zeros where nothing stays that minimises tr((W - W') H (W - W')^T), H = G + damping * mean diagonal: the
    ridge keeps weights near their own where the calibration inputs say nothing. Preconditioned by the diagonal of H."""
    ridge = damping * gram.diagonal().mean()
    diagonal = gram.diagonal() + ridge

    def masked_product(x: torch.Tensor) -> torch.Tensor:
        return (x @ gram + ridge * x).masked_fill(~stays, 0)

    new = weight.masked_fill(~stays, 0)
    residual = masked_product(weight - new)
    scaled = residual / diagonal
    direction, power = scaled, (residual * scaled).sum(1)
    start = power.clone()
    for _ in range(MOST_STEPS):
        if bool((power <= ENOUGH * start).all()):
            break
        product = masked_product(direction)
        step = power / (direction * product).sum(1).clamp_min(torch.finfo(power.dtype).tiny)
        new, residual = new + step[:, None] * direction, residual - step[:, None] * product
        scaled = residual / diagonal
        before, power = power, (residual * scaled).sum(1)
        direction = scaled + (power / before.clamp_min(torch.finfo(power.dtype).tiny))[:, None] * direction
    return new
