"""Hashes of a bundle's teacher, one for every tensor by diffusers' name, which show where another
base differs.

A base in another precision is compared as bfloat16; for a quantised one, a note says what cannot be
compared. In a bundle's metadata `ppcl_teacher` is JSON: {name: [dtype as stored, hash of its bytes,
hash of its bfloat16 values]}.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import xxhash

from ..system.headers import DTYPE_NAMES
from ..system.progress import Progress
from ..system.regular_files import Identity

TEACHER_KEY = "ppcl_teacher"
PLAIN = ("F64", "F32", "F16", "BF16")
SHOWN = 3
Recorded = dict[str, tuple[str, str, str]]
MOST_CHECKED = 200_000
_CHECKED: set[tuple[Identity, object, str]] = set()
"""(bundle, base, tensor), the files as last changed, where the tensor was found to be the
teacher's"""


class StoredModel(Protocol):
    """What is asked of a full model's file here; `weights.Weights` is one. Keys are diffusers'
    names."""

    path: Path

    def keys(self) -> list[str]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def is_scaled(self, key: str) -> bool: ...

    def stored(self, key: str) -> torch.Tensor: ...

    def identity(self, key: str) -> object: ...


def teacher_hashes(weights: StoredModel) -> str:
    """The hashes of every tensor; the whole model is read once, one tensor at a time."""
    keys = Progress(weights.keys(), desc="hash teacher", unit="tensor")
    return json.dumps({key: _hashes(weights, key) for key in keys}, separators=(",", ":"))


def _hashes(weights: StoredModel, key: str) -> tuple[str, str, str]:
    return _hashes_of(weights.stored(key), weights.is_scaled(key))


def _hashes_of(tensor: torch.Tensor, scaled: bool) -> tuple[str, str, str]:
    kind, exact = _kind(tensor.dtype, scaled), _digest(tensor)
    if kind not in PLAIN:
        return kind, exact, ""
    return kind, exact, exact if kind == "BF16" else _digest(tensor.bfloat16())


def _kind(dtype: torch.dtype, scaled: bool) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype)) + (" with a scale" if scaled else "")


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return xxhash.xxh3_64(data).hexdigest()


def without(text: str, names: frozenset[str] | set[str]) -> str:
    """The hashes without those of modulations that were folded away."""
    kept = {
        key: value for key, value in json.loads(text).items() if key.rpartition(".")[0] not in names
    }
    return json.dumps(kept, separators=(",", ":"))


@dataclass(frozen=True, eq=False)
class ExpectedBase:
    """What a bundle expects of its base."""

    bundle: Path
    """the bundle's file"""
    identity: Identity
    """the bundle's file as it was opened"""
    recorded: Recorded
    """name -> (dtype as stored, hash of its bytes, hash of its bfloat16 values)"""

    def check(self, weights: StoredModel, key: str, tensor: torch.Tensor) -> None:
        """Checks a tensor that was read, once for each pair of files. Raises ValueError when it
        differs, with the number of tensors that differ and the names of the first ones."""
        pair = (self.identity, weights.identity(key), key)
        if key not in self.recorded or pair in _CHECKED:
            return
        if self._differs(key, tensor, weights.is_scaled(key)):
            raise ValueError(self._difference(weights, key))
        if len(_CHECKED) > MOST_CHECKED:
            _CHECKED.clear()
        _CHECKED.add(pair)

    def notes(self, weights: StoredModel) -> list[str]:
        """What cannot be compared because the base stores it in another format than the teacher
        did."""
        pairs, there = Counter(), set(weights.keys())
        for key, (dtype, _, rounded) in self.recorded.items():
            if key in there and not self._is_comparable(
                dtype, rounded, stored_as := _kind(weights.dtype(key), weights.is_scaled(key))
            ):
                pairs[stored_as, dtype] += 1
        return [
            f"{weights.path}: {count} tensors are {stored_as}, the teacher of {self.bundle} had {dtype}, so they cannot "
            "be compared"
            for (stored_as, dtype), count in pairs.items()
        ]

    def _differs(self, key: str, tensor: torch.Tensor, scaled: bool) -> bool:
        dtype, exact, rounded = self.recorded[key]
        stored_as = _kind(tensor.dtype, scaled)
        if stored_as == dtype:
            return _digest(tensor) != exact
        return (
            self._is_comparable(dtype, rounded, stored_as) and _digest(tensor.bfloat16()) != rounded
        )

    @staticmethod
    def _is_comparable(dtype: str, rounded: str, stored_as: str) -> bool:
        """float16 rounds otherwise than bfloat16, so values that went through it may differ."""
        return stored_as == dtype or (bool(rounded) and stored_as in PLAIN and stored_as != "F16")

    def _difference(self, weights: StoredModel, first: str) -> str:
        rest = [key for key in weights.keys() if key in self.recorded and key != first]
        differ = [
            first,
            *(
                key
                for key in rest
                if self._differs(key, weights.stored(key), weights.is_scaled(key))
            ),
        ]
        names = ", ".join(differ[:SHOWN]) + (
            f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        )
        return (
            f"{weights.path} is not the teacher of {self.bundle}: {len(differ)} of {len(self.recorded)} tensors differ "
            f"({names}); choose the base model that it was made from"
        )


def check_all(expected: ExpectedBase, weights: StoredModel) -> None:
    """Checks every tensor of the base."""
    for key in Progress(weights.keys(), desc="compare base", unit="tensor"):
        expected.check(weights, key, weights.stored(key))
