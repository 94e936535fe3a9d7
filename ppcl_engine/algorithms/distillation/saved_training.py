"""A saved training's file: weights, moments, losses, and in its metadata the step and the settings
that it was made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError

from ...models.filling import check_shape
from ...system.tensor_files import TensorFile

WEIGHT = "weight."
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


def check_training(file: TensorFile, parameters: Mapping[str, tuple[int, ...]]) -> None:
    """All that a training goes on from is there, of its shape. Raises ValueError naming file and
    tensor."""
    step_of(file)
    for name, shape in parameters.items():
        moments = [f"{kind}.{name}" for kind in ("first", "second")]
        there = [moment for moment in moments if moment in file.entries]
        if len(there) == 1:
            raise ValueError(
                f"{file.path} has only {there[0]} of a parameter's two moments; train it again"
            )
        for key in (f"{WEIGHT}{name}", *there):
            check_shape(key, file.shape(key), shape, file.path)
            if not file.dtype(key).is_floating_point:
                raise ValueError(
                    f"{file.path}: {key} is {file.dtype(key)}, not numbers that are trained; train it again"
                )
