"""Calibration sets: what a block sees in real use, in batches of one shape each, in one file.

A batch is an architecture's inputs (latent tokens, timestep, text, mask, grid). Where the clean
picture is known (`clean`), training draws new noise and timesteps for it every round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..architectures import Inputs
from ..system.finite import check_finite
from ..system.json_text import json_text
from ..system.tensor_files import TensorFile, write_tensors
from . import flow
from .calibration_files import batch_names

CLEAN = "clean"
KIND = "ppcl_calibration"


@dataclass
class CalibrationSet:
    """Batches of inputs, and where they come from."""

    batches: list[Inputs]
    """inputs by diffusers' names, on the CPU; where known with `clean` [n, tokens, channels]"""
    origin: dict = field(default_factory=dict)
    """how it was made: architecture, model fingerprint, seed, source"""
    rows: Callable[[Inputs], Inputs] = lambda inputs: inputs
    """the rows of a batch that the methods return: all, unless several processes share the batch"""

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def samples(self) -> int:
        return sum(len(batch["timestep"]) for batch in self.batches)

    @property
    def hash(self) -> str:
        digest = hashlib.sha256(json_text(self.origin, sort_keys=True).encode())
        for batch in self.batches:
            for name in sorted(batch):
                digest.update(
                    name.encode()
                    + batch[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                )
        return digest.hexdigest()

    def inputs(self, batch: int) -> Inputs:
        return self.rows(self._whole(batch))

    def all_inputs(self) -> list[Inputs]:
        return [self.inputs(batch) for batch in range(len(self))]

    def fresh(self, batch: int, seed: int) -> Inputs:
        """The batch with new noise and timesteps, uniform in t; without a clean picture, the batch
        as recorded."""
        clean = self.batches[batch].get(CLEAN)
        if clean is None:
            return self.inputs(batch)
        timestep, noise = _drawn(clean, seed)
        noisy = flow.noised(clean.float(), noise, timestep)
        return self.rows({**self._whole(batch), "hidden_states": noisy, "timestep": timestep})

    def data_velocity(self, batch: int, seed: int) -> torch.Tensor:
        """noise - clean of `fresh(batch, seed)`. Raises ValueError where the clean picture is not
        known."""
        clean = self.batches[batch].get(CLEAN)
        if clean is None:
            raise ValueError(
                "this calibration set has no clean pictures; calibrate with --images, or use --data 0"
            )
        return self.rows({"velocity": _drawn(clean, seed)[1] - clean.float()})["velocity"]

    def split(self, held_out: int) -> tuple[CalibrationSet, CalibrationSet]:
        """(the first batches, the last `held_out`). Raises ValueError when nothing would be
        left."""
        if not 0 < held_out < len(self):
            raise ValueError(
                f"calibration has {len(self)} batches, so {held_out} cannot be held out; calibrate more"
            )
        return replace(self, batches=self.batches[:-held_out]), replace(
            self, batches=self.batches[-held_out:]
        )

    def check_model(self, architecture: str, fingerprint: str, where: object) -> None:
        expected = (self.origin.get("architecture"), self.origin.get("fingerprint"))
        if expected != (architecture, fingerprint):
            raise ValueError(f"{where} was calibrated on another model; run calibrate on this one")

    def _whole(self, batch: int) -> Inputs:
        return {name: t for name, t in self.batches[batch].items() if name != CLEAN}


def _drawn(clean: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(timestep [n], noise as `clean`)"""
    generator = torch.Generator().manual_seed(seed)
    timestep = torch.rand(len(clean), generator=generator)
    return timestep, torch.randn(clean.shape, generator=generator)


def save_calibration(path: Path, calibration: CalibrationSet) -> None:
    tensors = {
        f"{i}.{name}": t for i, batch in enumerate(calibration.batches) for name, t in batch.items()
    }
    write_tensors(path, tensors, {KIND: json_text(calibration.origin)})


def load_calibration(path: Path) -> CalibrationSet:
    """Raises ValueError for a file that is missing, is not safetensors, is not a calibration set,
    or is not finite."""
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist; run calibrate first")
    file = TensorFile(path)
    if KIND not in file.metadata:
        raise ValueError(f"{path} is not a calibration set; run calibrate")
    names = batch_names(file)
    batches = [{n: file.read(f"{i}.{n}") for n in batch} for i, batch in names.items()]
    for number, batch in enumerate(batches):
        check_finite(batch, f"{path}, batch {number}", "run calibrate again")
    return CalibrationSet(batches, file.about(KIND))
