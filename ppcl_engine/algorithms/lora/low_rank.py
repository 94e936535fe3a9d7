"""Low-rank changes of a matrix: the best of a rank, their energy, and the least-squares one that is
seen through a gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...models.lora_kinds import LowRank
from ...system.finite import check_finite
from ..least_squares import NOT_FITTED, RIDGE

OVERSAMPLED = 8  # directions that a randomised SVD looks at beyond those that it returns
CLOSED = 1e-12  # a channel whose gate's power is a smaller share of the largest counts as shut


def truncated(pairs: Sequence[LowRank], rank: int) -> LowRank:
    """The best approximation of the sum of pairs by one pair of a rank, its factors of equal norms.

    From QR of the stacked factors, U S V^T of the small core R_up R_down^T (Eckart and Young 1936):
    no matrix of the map's own size is made.
    """
    up, core, down = _factored(pairs)
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    root = values[:rank].sqrt()
    return LowRank(
        down=(root[:, None] * (right[:rank] @ down.T)).float(),
        up=((up @ left[:, :rank]) * root).float(),
        scale=1.0,
    )


def energy(pairs: Sequence[LowRank]) -> float:
    """Sum of the squared singular values of the pairs' sum, ||R_up R_down^T||_F^2."""
    return float(_factored(pairs)[1].square().sum()) if pairs else 0.0


def nearest(change: torch.Tensor, rank: int) -> LowRank:
    """A pair of a rank for a whole matrix, by randomised SVD (Halko et al. 2011)."""
    sketch = min(rank + OVERSAMPLED, *change.shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(change.double(), q=sketch, niter=4)
    root = values[:rank].sqrt()
    return LowRank(
        down=(root[:, None] * right[:, :rank].T).float(),
        up=(left[:, :rank] * root).float(),
        scale=1.0,
    )


def _factored(pairs: Sequence[LowRank]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orthonormal columns, core, orthonormal columns: their product, the last transposed, is the sum
    of the pairs."""
    ups = torch.cat([pair.scale * pair.up.double() for pair in pairs], dim=1)
    downs = torch.cat([pair.down.double() for pair in pairs])
    up, up_core = torch.linalg.qr(ups)
    down, down_core = torch.linalg.qr(downs.T)
    return up, up_core @ down_core.T, down


class GatedEquations:
    """Sums for the change M of a linear map that minimises sum over samples n and tokens t of
    || g_n * (M h_t) - y_t ||^2, in float64.

    h is what the map reads, g_n the gate [outputs] between it and the stream, y the change that the
    stream is to make. Every output would need a Gram matrix of its own, weighted by its gate. They
    are one where the squared gates are a product, g_nc^2 = w_n a_c, which is taken for them here:
    w_n their mean over channels, a_c the least-squares factor. Exact for gates that differ between
    samples only, or between channels only.
    """

    def __init__(self, inputs: int, outputs: int, device: str = "cpu"):
        options = {"dtype": torch.float64, "device": device}
        self.gram = torch.zeros(inputs, inputs, **options)
        self.product = torch.zeros(outputs, inputs, **options)
        self.factor = torch.zeros(outputs, **options)
        self.weight = torch.zeros((), **options)

    def add(self, h: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> None:
        """h [tokens, inputs], gate [outputs], y [tokens, outputs], of one sample"""
        h, gate, y = h.double(), gate.double(), y.double()
        weight = gate.square().mean()
        self.gram += weight * (h.T @ h)
        self.product += gate[:, None] * (y.T @ h)
        self.factor += weight * gate.square() * len(h)
        self.weight += weight.square() * len(h)

    def solve(self, rank: int) -> LowRank:
        """The minimum of a rank: reduced-rank regression (Izenman 1975) in the metric in which errors
        of the stream are measured. Each input is shrunk by RIDGE of its own power.

        Raises ValueError for sums that are not finite.
        """
        check_finite(
            {"sum": self.gram, "product": self.product}, "what a pair is fitted to", NOT_FITTED
        )
        a = self.factor / self.weight.clamp_min(torch.finfo(torch.float64).tiny)
        power = self.gram.diagonal()
        scale = torch.where(power > 0, power.sqrt(), 1.0)
        gram = self.gram / scale.outer(scale)
        gram.diagonal().add_(RIDGE).add_(power == 0)
        seen = a > CLOSED * a.max()
        root = torch.where(seen, a.sqrt(), 0.0)
        inverse = torch.where(seen, 1 / root, 0.0)
        # rows in the metric of the stream, columns scaled to one power
        wanted = inverse[:, None] * self.product / scale
        solved = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(gram)).T
        leading = torch.linalg.eigh(solved @ wanted.T).eigenvectors[:, -rank:]
        down = leading.T @ solved / scale
        return truncated([LowRank(down.float(), (inverse[:, None] * leading).float(), 1.0)], rank)
