"""The check of a calibration set's file: names, shapes, and the few numbers that sizes depend
on."""

from __future__ import annotations

import re
from typing import NoReturn

from ..system.tensor_files import TensorFile

NAME = re.compile(r"([0-9]{1,6})\.([A-Za-z_]{1,80})")
NEEDED = {"hidden_states": 3, "timestep": 1, "encoder_hidden_states": 3, "grid": 2}
"""a batch's tensor -> its number of dimensions"""
WHOLE = ("grid", "encoder_hidden_states_mask")  # integers or booleans
MOST_SIDE = 1 << 16  # tokens


def batch_names(file: TensorFile) -> dict[int, list[str]]:
    """Number of each batch -> names of its tensors.

    Raises ValueError, naming file and tensor, for a batch that lacks one, whose tensors differ in
    their number of samples, or that has impossible sizes.
    """
    batches: dict[int, list[str]] = {}
    for key in file.keys():
        match = NAME.fullmatch(key)
        if match is None or str(int(match[1])) != match[1]:
            _refuse(file, f"{key[:80]!r} is not the name of a batch's tensor")
        batches.setdefault(int(match[1]), []).append(match[2])
    if sorted(batches) != list(range(len(batches))) or not batches:
        _refuse(file, f"its batches are not numbered from 0 ({len(batches)} are there)")
    for number in sorted(batches):
        _check_batch(file, number, batches[number])
    return dict(sorted(batches.items()))


def _check_batch(file: TensorFile, number: int, names: list[str]) -> None:
    for name, dimensions in NEEDED.items():
        if name not in names:
            _refuse(file, f"batch {number} lacks {name}")
        if len(file.shape(f"{number}.{name}")) != dimensions:
            _refuse(
                file,
                f"{number}.{name} has shape {file.shape(f'{number}.{name}')}, which is not of {dimensions} dimensions",
            )
    samples = file.shape(f"{number}.timestep")[0]
    for name in names:
        shape, dtype = file.shape(f"{number}.{name}"), file.dtype(f"{number}.{name}")
        if name != "grid" and shape[:1] != (samples,):
            _refuse(file, f"{number}.{name} is of {shape[:1]} samples, timestep of {samples}")
        if dtype.is_floating_point == (name in WHOLE):
            _refuse(file, f"{number}.{name} is {dtype}")
    if not samples:
        _refuse(file, f"batch {number} is empty")
    grid = file.read(f"{number}.grid")
    tokens = file.shape(f"{number}.hidden_states")[1]
    if (
        grid.shape[1:] != (3,)
        or not len(grid)
        or int(grid.min()) < 1
        or int(grid.max()) > MOST_SIDE
    ):
        _refuse(file, f"{number}.grid {grid.tolist()} is not (frames, rows, columns) of pictures")
    if int(grid[0].prod()) != tokens:
        _refuse(file, f"{number}.hidden_states has {tokens} tokens, its grid {int(grid[0].prod())}")


def _refuse(file: TensorFile, reason: str) -> NoReturn:
    raise ValueError(f"{file.path}: {reason}; run calibrate again")
