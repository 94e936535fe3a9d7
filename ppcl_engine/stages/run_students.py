"""Reads the trained parts of a run as those of a bundle are read."""

from __future__ import annotations

import torch
from torch import nn

from ..algorithms.distillation.trainer import saved_weights
from ..architectures import Architecture
from ..models.surgery import filled_student
from ..plan import Interval
from ..run import Run
from ..system.regular_files import identity_of
from ..system.tensor_files import TensorFile


class RunStudents:
    """The trained parts of a run: with `polished` the polished ones, where there are any. It is one of
    the `models.assembly.Students`."""

    def __init__(self, run: Run, config: dict, architecture: Architecture, polished: bool = True):
        self.run, self.config, self.architecture = run, config, architecture
        self._file = run.best if polished else (lambda trained: trained)
        self._tuned_files: dict[str, TensorFile] = {}

    def student(self, interval: Interval, dtype: torch.dtype, device: str) -> nn.Module:
        path = self._file(self.run.student(interval.name))
        saved = saved_weights(path, "distill-depth")
        state = {name: tensor.to(device, dtype) for name, tensor in saved.items()}
        return filled_student(self.architecture, self.config, interval, state, path)

    def projection(
        self, place: str, kind: str, dtype: torch.dtype, device: str
    ) -> dict[str, torch.Tensor]:
        saved = saved_weights(self._file(self.run.projection(place, kind)), "distill-width")
        return {name: tensor.to(device, dtype) for name, tensor in saved.items()}

    def tuned(self, variant: str, key: str) -> torch.Tensor:
        return self._tuned_file(variant).read(f"weight.{key}")

    def _tuned_file(self, variant: str) -> TensorFile:
        """Opened once, not for each of a model's tensors: its header names all of them. Opened again
        when it has changed."""
        path = self.run.tuned_variant(variant)
        if not path.exists():
            raise ValueError(f"{path} does not exist; run finetune first")
        file = self._tuned_files.get(variant)
        if file is None or file.identity != identity_of(path.stat()):
            file = self._tuned_files[variant] = TensorFile(path)
        return file
