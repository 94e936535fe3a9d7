"""The modulations that a loader folds away: where files store them, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ...ppcl_engine.architectures import Architecture
from ...ppcl_engine.architectures.base import modulation_names
from ...ppcl_engine.architectures.folded import FORMS, Folding
from ...ppcl_engine.models.folding.basis import MARKED, mark_of
from ...ppcl_engine.system.float8 import FP8_MARK
from .formats import float8_of
from .quantised import Quantised, in_fp8

OFF = "off"
FOLDS = (OFF, *FORMS)


@dataclass(frozen=True, eq=False)
class Modulations:
    """The modulations of one model."""

    architecture: Architecture
    stored: dict[str, dict[str, object]]
    """module's name in the file -> "weight" or "bias" -> where that tensor is"""
    embedder: dict[str, object]
    """the time embedder's tensors by their full names -> where each is"""
    float8: torch.dtype | None = None
    """dtype of the matrices of a scaled fp8 base; an unfolded model keeps its students' matrices in
    it too"""

    @property
    def shapes(self) -> list[tuple]:
        """What tells one set of modulations from another: names, shapes (some may be cut to their
        first half), and the formats of quantised ones."""
        return sorted((name, tuple(self.shape(name)), *self._format(name)) for name in self.stored)

    def _format(self, name: str) -> tuple[str, ...]:
        weight = self.stored[name]["weight"]
        named = isinstance(weight, Quantised) and weight.old is None
        return (json.dumps(weight.settings, sort_keys=True),) if named else ()

    def shape(self, name: str) -> tuple[int, int]:
        return self.stored[name]["weight"].shape

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """ "weight" and "bias" (and scales) as the unfolded model has them."""
        weight, bias = self.stored[name]["weight"], {"bias": self.stored[name]["bias"].read()}
        if isinstance(weight, Quantised):
            return weight.tensors() | bias
        return (
            in_fp8(weight.read(), self.float8) if self.float8 else {"weight": weight.read()}
        ) | bias

    def values(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias as plain numbers, with any scale applied."""
        return _values(self.stored[name]["weight"]), self.stored[name]["bias"].read()

    def read_embedder(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = _values(self.embedder[name])
        return tensor if dtype is None else tensor.to(dtype)

    @cached_property
    def mark(self) -> str:
        """The same mark as the engine computes from the whole file."""
        locations = {
            name + leaf: leaves[leaf[1:]] for name, leaves in self.stored.items() for leaf in MARKED
        }
        locations |= {
            name: location for name, location in self.embedder.items() if name.endswith(MARKED)
        }
        return mark_of(
            locations,
            lambda name, rows: locations[name].first_rows(rows) if rows else locations[name].read(),
        )


def _values(location) -> torch.Tensor:
    return location.values(torch.float32) if isinstance(location, Quantised) else location.read()


@dataclass(frozen=True)
class Fold:
    """What stands for folded modulations."""

    folding: Folding
    tensors: dict[str, torch.Tensor]
    """by the file's names"""
    bytes_read: int = 0
    notes: tuple[str, ...] = ()
    """for the user, a line each"""
    later: Modulations | None = None
    """what a table is filled from when a schedule is sampled"""


MakeFold = Callable[[str, Modulations], Fold]
"""(form, modulations) -> what stands for them"""


def _why_not(architecture: Architecture) -> str:
    reads = architecture.modulation_reads({})
    if reads == ("the timestep",):
        return "those of its kind are small maps, which are not folded"
    return f"those of its kind read {' and '.join(reads)}"


def split(
    architecture: Architecture, wanted: dict[str, object]
) -> tuple[dict[str, object], Modulations]:
    """Divides a model's tensors into (all others, its modulations). Raises ValueError for a model
    without modulations."""
    names = modulation_names(wanted, architecture)
    if not names:
        raise ValueError(
            f"this {architecture.name} model has no modulations to fold: {_why_not(architecture)}; set fold to off"
        )
    stored: dict[str, dict[str, object]] = {name: {} for name in names}
    rest = {}
    for name, location in wanted.items():
        module, _, leaf = name.rpartition(".")
        if module in stored:
            stored[module][leaf] = location
        else:
            rest[name] = location
    embedder = {
        name: location
        for name, location in wanted.items()
        if name.startswith(f"{architecture.time_embedder}.")
    }
    float8 = float8_of(wanted[FP8_MARK].read()) if FP8_MARK in wanted else None
    return rest, Modulations(architecture, stored, embedder, float8)
