"""The exact error of a changed layer on its calibration inputs, and how one weight more or less
changes it."""

from __future__ import annotations

import torch


def layer_error(removed: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(D G D^T): the mean squared change of the layer's output.

    removed: D = W - W' [rows, columns], gram: G, the weighted mean of x x^T [columns, columns].
    """
    return float(((removed @ gram) * removed).sum())


def relative_error(removed: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    """The same, relative to the layer's output without its bias; 0 for a layer whose output is
    zero."""
    whole = layer_error(weight, gram)
    return layer_error(removed, gram) / whole if whole > 0 else 0.0


def drop_costs(
    weight: torch.Tensor, gram: torch.Tensor, removed_gram: torch.Tensor
) -> torch.Tensor:
    """By how much the error rises when W_ij goes too: W_ij^2 G_jj + 2 W_ij (D G)_ij. removed_gram:
    D G."""
    return weight.square() * gram.diagonal() + 2 * weight * removed_gram


def keep_gains(
    weight: torch.Tensor, gram: torch.Tensor, removed_gram: torch.Tensor
) -> torch.Tensor:
    """By how much it falls when the dropped W_ij comes back: 2 W_ij (D G)_ij - W_ij^2 G_jj."""
    return 2 * weight * removed_gram - weight.square() * gram.diagonal()
