"""The two curves that intervals are chosen by, over pairs of blocks (u, k): the CKA curve and the
damage. `chains.py` measures them.

Block u stays real and what follows up to k is replaced: by the probes (`cka`, the paper's curve),
or by one least-squares map (`error`, what a student's closed form leaves on the final velocity).
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
    """cka [blocks, longest, 1 + resamples], first column all samples; NaN where there is no pair.
    error [blocks, longest, held-out samples] and power [held-out samples]: squared error of the
    final velocity and its own square, summed over a sample. fit [blocks, longest, 2, 3]: of the
    least-squares map of image and text, the residual of the whole, of the median and of the worst
    channel. Entry [u, j] belongs to the interval [u, u + j]."""

    cka: torch.Tensor
    error: torch.Tensor
    power: torch.Tensor
    fit: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"cka": self.cka, "error": self.error, "power": self.power, "fit": self.fit}

    def fit_of(self, u: int, v: int) -> dict[str, dict[str, float]]:
        """By stream, of those that have a map."""
        rows = {stream: self.fit[u, v - u, row].tolist() for row, stream in enumerate(STREAMS)}
        return {
            s: dict(zip(FIT, row, strict=True)) for s, row in rows.items() if not math.isnan(row[0])
        }

    def cka_of(self, column: int) -> Callable[[int, int], float]:
        table = self.cka[:, :, column].tolist()
        return lambda u, k: table[u][k - u]

    def damage_of(self, weights: torch.Tensor) -> Callable[[int, int], float]:
        """weights [held-out samples]: how often each sample counts."""
        table = (self.error @ weights / (self.power @ weights)).tolist()
        return lambda u, k: table[u][k - u]


def section_starts(teacher: Teacher) -> frozenset[int]:
    """First blocks of the runs of one kind: no interval goes on over one."""
    return frozenset(section.start for section in teacher.architecture.sections(teacher.config))


def block_passes(
    blocks: int, longest: int, curves: int, starts: frozenset[int] = frozenset()
) -> int:
    """Teacher blocks that a batch goes through: one sweep, and (last - k) for every pair of every
    full curve."""
    return blocks + curves * sum(blocks - 1 - k for _, k in pairs(blocks, longest, starts))


def load_curves(path: Path, settings: str) -> tuple[Curves | None, int]:
    """Curves of the same settings, and how many first blocks they cover."""
    if path.exists() and (file := TensorFile(path)).metadata.get("settings") == settings:
        return Curves(**file.read_all()), int(file.metadata["blocks"])
    return None, 0
