"""The two curves over pairs of blocks (u, k) by which intervals are chosen: the CKA curve and the
damage. `chains.py` measures them.

Block u runs as it is, and the blocks after it up to k are replaced: by the probes (`cka`, the
paper's curve), or by one least-squares map (`error`, the error on the final velocity that a
student's closed form leaves).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...models.streaming import Teacher
from ...system.tensor_files import TensorFile
from .intervals import pairs

STREAMS, FIT = ("image", "text"), ("residual", "median", "worst")


@dataclass(frozen=True)
class Curves:
    """Both curves. Entry [u, j] belongs to the interval [u, u + j]; NaN where there is no such
    pair."""

    cka: torch.Tensor
    """[blocks, longest, 1 + resamples]; the first column is of all samples"""
    error: torch.Tensor
    """[blocks, longest, held-out samples]: squared error of the final velocity, summed over a
    sample"""
    power: torch.Tensor
    """[held-out samples]: square of the velocity itself, summed over a sample"""
    fit: torch.Tensor
    """[blocks, longest, 2, 3]: residual of the least-squares map of image and text: over all
    channels, of the median channel, of the worst one"""

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"cka": self.cka, "error": self.error, "power": self.power, "fit": self.fit}

    def fit_of(self, u: int, v: int) -> dict[str, dict[str, float]]:
        """The fit of each stream that has a map."""
        rows = {stream: self.fit[u, v - u, row].tolist() for row, stream in enumerate(STREAMS)}
        return {
            s: dict(zip(FIT, row, strict=True)) for s, row in rows.items() if not math.isnan(row[0])
        }

    def cka_of(self, column: int) -> Callable[[int, int], float]:
        table = self.cka[:, :, column].tolist()
        return lambda u, k: table[u][k - u]

    def damage_of(self, weights: torch.Tensor) -> Callable[[int, int], float]:
        """The damage as a function of (u, k). weights [held-out samples]: how often each sample
        counts."""
        table = (self.error @ weights / (self.power @ weights)).tolist()
        return lambda u, k: table[u][k - u]


def section_starts(teacher: Teacher) -> frozenset[int]:
    """First blocks of the runs of one kind; no interval goes beyond the end of a run."""
    return frozenset(section.start for section in teacher.architecture.sections(teacher.config))


def block_passes(
    blocks: int, longest: int, curves: int, starts: frozenset[int] = frozenset()
) -> int:
    """How many teacher blocks a batch goes through: one sweep, and (last - k) for every pair of
    every full curve."""
    return blocks + curves * sum(blocks - 1 - k for _, k in pairs(blocks, longest, starts))


def load_curves(path: Path, settings: str) -> tuple[Curves | None, int]:
    """Saved curves of the same settings, and how many first blocks they cover."""
    if path.exists() and (file := TensorFile(path)).metadata.get("settings") == settings:
        return Curves(**file.read_all()), int(file.metadata["blocks"])
    return None, 0
