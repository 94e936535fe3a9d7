"""What a weight is worth to its layer: pure functions of W [rows, columns] and of its inputs; the
lowest are dropped.

energy [columns]: E_j, the weighted mean over tokens and timesteps of X_j^2, which is the diagonal
of the layer's Gram matrix.
"""

from __future__ import annotations

import torch

RIA_POWER = 0.5
SHARES = (0.5, 0.6, 2 / 3, 0.75)  # of the activation in the energy score; 1/2 ranks as Wanda does
LEAST = 1e-30


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """|W| (Han et al. 2015, arXiv 1506.02626)."""
    return weight.abs()


def wanda(weight: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """|W_ij| ||X_j|| (Sun et al. 2023, arXiv 2306.11695, equation 1)."""
    return weight.abs() * energy.sqrt()


def ria(weight: torch.Tensor, energy: torch.Tensor, power: float = RIA_POWER) -> torch.Tensor:
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||^a, a = 1/2: relative importance and
    activations (Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", ICLR 2024)."""
    size = weight.abs()
    relative = size / size.sum(0).clamp_min(LEAST) + size / size.sum(1, keepdim=True).clamp_min(
        LEAST
    )
    return relative * energy.sqrt() ** power


def balanced_energy(weight: torch.Tensor, energy: torch.Tensor, share: float) -> torch.Tensor:
    """(W^2 / mean W^2)^(1-g) (E / mean E)^g, g = `share`.

    A reconstruction: of "Post-Training Pruning for Diffusion Transformers" (arXiv 2607.00927) only
    the abstract is public, which says that weights count for too much in the scores of language
    models, and that weight and activation are balanced from an energy view. The formula, and
    choosing g by the layer's error, are ours.
    """
    squares = weight.square()
    relative = (squares / squares.mean().clamp_min(LEAST)) ** (1 - share)
    return relative * (energy / energy.mean().clamp_min(LEAST)) ** share


def surgeon(weight: torch.Tensor, inverse_diagonal: torch.Tensor) -> torch.Tensor:
    """W_ij^2 / [H^-1]_jj: the error of dropping one weight when the others of its row compensate
    (optimal brain surgeon; Frantar and Alistarh 2023, SparseGPT, arXiv 2301.00774, equation 3)."""
    return weight.square() / inverse_diagonal
