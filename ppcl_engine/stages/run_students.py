"""Reads the trained parts of a run as those of a bundle are read."""

from __future__ import annotations

import torch
from torch import nn

from ..algorithms.distillation.trainer import saved_weights
from ..architectures import Architecture
from ..models.surgery import filled_student
from ..plan import Interval
from ..run import Run
from ..system.tensor_files import TensorFile


class RunStudents:
    """The trained parts of a run: with `polished` the polished ones, where there are any. It is one of
    the `models.assembly.Students`."""

    def __init__(self, run: Run, config: dict, architecture: Architecture, polished: bool = True):
        self.run, self.config, self.architecture = run, config, architecture
        self._file = run.best if polished else (lambda trained: trained)

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
        path = self.run.tuned_variant(variant)
        if not path.exists():
            raise ValueError(f"{path} does not exist; run finetune first")
        return TensorFile(path).read(f"weight.{key}")
