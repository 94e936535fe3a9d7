"""A file's tensors as numbers: a quantised matrix, its scales and its format are one tensor."""

from __future__ import annotations

import torch

from ..architectures import Part
from ..system.tensor_files import TensorFile
from .scales import IGNORED_SUFFIXES, scales_of, shape_in


class RealValues:
    """The tensors of a file by name. Raises ValueError naming what is not read."""

    def __init__(self, file: TensorFile):
        self._file, self.path = file, file.path
        stored = {name: (file, name) for name in file.keys()}
        self._scales = scales_of(stored, file.metadata, file.path)

    def keys(self) -> list[str]:
        return [name for name in self._file.keys() if not name.endswith(IGNORED_SUFFIXES)]

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_in((self._file, name), name, self._scales)

    def dtype(self, name: str) -> torch.dtype:
        """What `read` gives: float32 of a quantised matrix, else as stored."""
        return torch.float32 if name in self._scales else self._file.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._file.read(name)
        return self._scales[name].apply(tensor, Part(name)) if name in self._scales else tensor
