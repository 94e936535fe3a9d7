"""The modulations of a model that a loader folds away: where they are stored, read one at a time.
Knows files, not the host."""

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
    """stored: a module's name in the file -> its tensors' names in it ("weight", "bias") -> where
    each is;
    embedder: the time embedder's, by their whole names; architecture: that they are of. float8:
    what a scaled base keeps matrices in, and the unfolded model those of its students too."""

    architecture: Architecture
    stored: dict[str, dict[str, object]]
    embedder: dict[str, object]
    float8: torch.dtype | None = None

    @property
    def shapes(self) -> list[tuple]:
        """Which modulations there are, which are cut to their first half, and the formats of those
        of few bits."""
        return sorted((name, tuple(self.shape(name)), *self._format(name)) for name in self.stored)

    def _format(self, name: str) -> tuple[str, ...]:
        weight = self.stored[name]["weight"]
        named = isinstance(weight, Quantised) and weight.old is None
        return (json.dumps(weight.settings, sort_keys=True),) if named else ()

    def shape(self, name: str) -> tuple[int, int]:
        return self.stored[name]["weight"].shape

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """As the unfolded model has them."""
        weight, bias = self.stored[name]["weight"], {"bias": self.stored[name]["bias"].read()}
        if isinstance(weight, Quantised):
            return weight.tensors() | bias
        return (
            in_fp8(weight.read(), self.float8) if self.float8 else {"weight": weight.read()}
        ) | bias

    def values(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias, a scale applied."""
        return _values(self.stored[name]["weight"]), self.stored[name]["bias"].read()

    def read_embedder(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = _values(self.embedder[name])
        return tensor if dtype is None else tensor.to(dtype)

    @cached_property
    def mark(self) -> str:
        """As the engine's of a whole file."""
        places = {
            name + leaf: leaves[leaf[1:]] for name, leaves in self.stored.items() for leaf in MARKED
        }
        places |= {name: place for name, place in self.embedder.items() if name.endswith(MARKED)}
        return mark_of(
            places,
            lambda name, rows: places[name].first_rows(rows) if rows else places[name].read(),
        )


def _values(place) -> torch.Tensor:
    return place.values(torch.float32) if isinstance(place, Quantised) else place.read()


@dataclass(frozen=True)
class Fold:
    """What stands for the modulations: `tensors` by the file's names. later: what a table is filled
    from."""

    folding: Folding
    tensors: dict[str, torch.Tensor]
    bytes_read: int = 0
    notes: tuple[str, ...] = ()
    later: Modulations | None = None


MakeFold = Callable[[str, Modulations], Fold]
"""(form, modulations) -> what stands for them"""


def split(
    architecture: Architecture, wanted: dict[str, object]
) -> tuple[dict[str, object], Modulations]:
    """(everything else, the modulations) of tensors by name. Raises ValueError for a model that has
    none."""
    names = modulation_names(wanted, architecture)
    if not names:
        raise ValueError(
            f"this {architecture.name} model has no modulations to fold: those of its kind read "
            f"{' and '.join(architecture.modulation_reads({}))}; set fold to off"
        )
    stored: dict[str, dict[str, object]] = {name: {} for name in names}
    rest = {}
    for name, place in wanted.items():
        module, _, leaf = name.rpartition(".")
        if module in stored:
            stored[module][leaf] = place
        else:
            rest[name] = place
    embedder = {
        name: place
        for name, place in wanted.items()
        if name.startswith(f"{architecture.time_embedder}.")
    }
    float8 = float8_of(wanted[FP8_MARK].read()) if FP8_MARK in wanted else None
    return rest, Modulations(architecture, stored, embedder, float8)
