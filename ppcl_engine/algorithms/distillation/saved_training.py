"""A saved training's file: weights, moments, losses, and in its metadata the step and the settings
that it was made with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError

from ...models.filling import check_shape
from ...system.finite import check_finite
from ...system.tensor_files import TensorFile
from .compact_state import CODES, scale_shape
from .part_optimizer import MOMENTS, SCALES

WEIGHT = "weight."
RAW = "raw."
AVERAGE = "average."
"""of tensors in memory; a file has them as `weight.`"""
LOSSES = "losses"
STEP = Annotated[str, Field(pattern=r"^[0-9]{1,9}\z")]


def step_of(file: TensorFile) -> int:
    """Raises ValueError naming the file where its metadata has no number of steps."""
    text = file.text("step")
    try:
        return int(TypeAdapter(STEP).validate_python(text))
    except ValidationError:
        raise ValueError(
            f"{file.path}: its metadata says step {text[:40]!r}, which is not a number; train it again"
        ) from None


def settings_of(file: TensorFile) -> dict:
    return file.about("settings")


def read_losses(path: Path) -> torch.Tensor:
    """The loss of each update so far [steps]. Raises ValueError naming the file without them."""
    file = TensorFile(path)
    if len(file.shape(LOSSES)) != 1 or not file.dtype(LOSSES).is_floating_point:
        raise ValueError(f"{path}: its losses are not a row of numbers; train it again")
    return file.read(LOSSES)


def moment_names(file: TensorFile, parameters: Iterable[str]) -> list[str]:
    """The moments that are there: a parameter has none before its first update."""
    kinds = (*MOMENTS, *SCALES.values())
    keys = [f"{kind}.{name}" for name in parameters for kind in kinds]
    return [key for key in keys if key in file.entries]


def check_training(file: TensorFile, parameters: Mapping[str, tuple[int, ...]]) -> None:
    """All that a training goes on from is there, of its shape. Raises ValueError naming file and
    tensor."""
    step_of(file)
    for name, shape in parameters.items():
        moments = [f"{kind}.{name}" for kind in MOMENTS]
        there = [moment for moment in moments if moment in file.entries]
        if len(there) == 1:
            raise ValueError(
                f"{file.path} has only {there[0]} of a parameter's two moments; train it again"
            )
        expected = {key: shape for key in (f"{WEIGHT}{name}", *there)}
        for kind, scales in SCALES.items():
            codes, scales = f"{kind}.{name}", f"{scales}.{name}"
            packed = codes in there and file.dtype(codes) == CODES
            if packed != (scales in file.entries):
                raise ValueError(f"{file.path}: {codes} and {scales} do not match; train it again")
            expected |= {scales: scale_shape(shape)} if packed else {}
        expected |= {key: shape for key in (f"{RAW}{name}",) if key in file.entries}
        for key, size in expected.items():
            check_shape(key, file.shape(key), size, file.path)
            if not file.dtype(key).is_floating_point:
                raise ValueError(
                    f"{file.path}: {key} is {file.dtype(key)}, not numbers that are trained; train it again"
                )


@dataclass(frozen=True, kw_only=True)
class SavedParts:
    """The parts in the file of a training on the velocity: `weight.` is what is used, averaged where
    there is an average, and then `raw.` what is trained on."""

    file: TensorFile
    names: Mapping[str, Sequence[str]]
    """part -> its tensors"""
    counts: dict[str, float]
    """updates of each parameter"""
    averaged: bool

    def weights(self, part: str) -> dict[str, torch.Tensor]:
        """What is trained on, and tables that training never moves (buffers). Raises ValueError for
        what is not finite."""
        raw = [name for name in self.names[part] if self.averaged and name in self.counts]
        kind = {name: RAW if name in raw else WEIGHT for name in self.names[part]}
        return self._read({name: f"{kind[name]}{name}" for name in self.names[part]})

    def state(self, part: str) -> dict[str, torch.Tensor]:
        """Its moments and averages."""
        keys = {key: key for key in moment_names(self.file, self.names[part])}
        if self.averaged:
            trained = [name for name in self.names[part] if name in self.counts]
            keys |= {f"{AVERAGE}{name}": f"{WEIGHT}{name}" for name in trained}
        return self._read(keys)

    def _read(self, keys: dict[str, str]) -> dict[str, torch.Tensor]:
        tensors = {name: self.file.read(key) for name, key in keys.items()}
        advice = "remove the file, lower --learning-rate and train again"
        check_finite(tensors, self.file.path, advice)
        return tensors
