"""One training loop's parts: schedule, optimiser state in safetensors, divergence.

Every batch is a function of (seed, step), so a run that goes on from its last save ends in the
same bits as one that was never stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from ...architectures.modules import AnyModule
from ...settings.base_settings import TrainingConfig
from ...system import progress
from ...system.distributed import processes
from ...system.finite import check_finite, first_not_finite
from ...system.tensor_files import TensorFile, write_tensors
from .part_optimizer import PartOptimizer
from .quantization import NONE
from .saved_training import LOSSES, WEIGHT, check_training, moment_names, settings_of, step_of
from .sharding import local

FINAL_SHARE = 1 / 30
PLAIN_SHARE = 0.9
"""On a student of the demo's in int4: 0.95 left as much error, 0.75 a fifth more, 0 more than plain
training."""


class Diverged(ValueError):
    """Loss, gradient or weights are not finite; the message names step and interval, and what is
    kept."""


def cosine_schedule(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Linear warm-up, then cosine to a thirtieth of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (
        FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    )


def rounding(config: TrainingConfig, step: int, steps: int) -> str:
    """What --quant-aware rounds to in this step: nothing in the first PLAIN_SHARE of them. At
    higher rates weights jump from one rounded value to the next."""
    return config.quant_aware if step >= PLAIN_SHARE * steps else NONE


class Training:
    """How far a training is: its steps and losses, and when it was saved."""

    def __init__(self):
        self.step = 0
        self.saved: int | None = None
        """The step whose state is on disk."""
        self.losses: list[float] = []
        self.about: dict[str, str] = {}  # of how it began, for people who read its file

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        """Writes all tensors. Raises Diverged, with what was saved before kept, for what is not
        finite."""
        raise NotImplementedError

    def save(self, path: Path, settings: str) -> None:
        """Writes the training. Processes that share batches have equal weights, or parts of the
        same, so only the main one writes and the others wait for it. Raises Diverged as `write` does."""
        self.write(path, {**self.about, "step": str(self.step), "settings": settings})
        self.saved = self.step
        if processes().by_rows:
            processes().wait()
            if saved_step(path, settings) != self.step:
                raise ValueError(
                    f"{path} is not what the main process wrote; all machines must share the --run folder"
                )

    def restore_progress(self, file: TensorFile) -> None:
        self.step = self.saved = step_of(file)
        self.about = {
            name: text for name, text in file.metadata.items() if name not in ("step", "settings")
        }
        self.losses = file.read(LOSSES).tolist()

    def finish_step(self, loss: float, where: str) -> None:
        self.losses.append(loss)
        progress.measured(where, self.step, loss)
        self.step += 1

    def check_finite(self, what: str, value: float, where: str) -> None:
        """Raises Diverged for a loss or a gradient's norm that is not finite."""
        if not math.isfinite(value):
            raise Diverged(f"{what} is {value} at step {self.step} of {where}; {self._kept()}")

    def check_finite_tensors(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        """The same for weights or moments."""
        name = first_not_finite({n: local(t) for n, t in tensors.items()})
        if processes().any(name is not None):
            raise Diverged(
                f"{name or 'a tensor'} is not finite at step {self.step} of {path.stem}; {self._kept()}"
            )

    def _kept(self) -> str:
        if self.saved is None:
            return "nothing was saved; lower --learning-rate"
        return f"the last good state (step {self.saved}) is kept, lower --learning-rate"


class Trainer(Training):
    """A module of one part, its AdamW and its loss history; saved and restored whole."""

    def __init__(self, module: AnyModule, weight_decay: float):
        super().__init__()
        self.module = module.requires_grad_(True)
        self.optimizer = PartOptimizer(dict(module.named_parameters()), weight_decay)

    def update(self, loss: torch.Tensor, learning_rate: float, where: str) -> None:
        """One step of AdamW. Raises Diverged, before the weights are touched, when loss or gradient
        is not finite.

        `loss`: of this process's rows, if processes share the batch; each then makes the step of
        the whole batch.
        """
        self.optimizer.zero_grad()
        loss.backward()
        value = float(processes().sum_gradients(self.module.parameters(), loss))
        self.check_finite("loss", value, where)
        self.check_finite("gradient", self.optimizer.clip(), where)
        self.optimizer.step(learning_rate)
        self.finish_step(value, where)

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        tensors = self.finite_tensors(path)
        if processes().writes:
            write_tensors(path, tensors, metadata)

    def finite_tensors(self, path: Path) -> dict[str, torch.Tensor]:
        """Raises Diverged, with what was saved before kept, for weights or moments that are not
        finite."""
        tensors = self.tensors()
        self.check_finite_tensors(tensors, path)
        return tensors

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a save holds: weights, moments and losses."""
        weights = {f"{WEIGHT}{name}": tensor for name, tensor in self.optimizer.used().items()}
        losses = torch.tensor(self.losses, dtype=torch.float32)
        return {**weights, **self.optimizer.moments(), LOSSES: losses}

    @property
    def bytes(self) -> int:
        """The size of the weights and their moments."""
        return sum(p.nbytes for p in self.module.parameters()) * 3

    def to(self, device: str) -> Trainer:
        """Itself, moved whole."""
        self.module.to(device)
        self.optimizer.load_moments(self.optimizer.moments(), self.optimizer.counts())
        return self

    def restore(self, path: Path) -> None:
        """Raises ValueError for a file whose weights are not finite, as earlier versions wrote
        them."""
        file = TensorFile(path)
        check_training(file, {name: tuple(p.shape) for name, p in self.module.named_parameters()})
        self.restore_progress(file)
        names = self.optimizer.parameters
        for name, parameter in names.items():
            parameter.data.copy_(file.read(f"{WEIGHT}{name}"))
        moments = {key: file.read(key) for key in moment_names(file, names)}
        self.optimizer.load_moments(moments, dict.fromkeys(names, float(self.step)))
        check_finite(self.tensors(), path, "remove the file, lower --learning-rate and train again")


def resume_settings(config: TrainingConfig, names: Iterable[str]) -> dict:
    """The settings that decide a training's result, saved with it and compared when it resumes.

    `quant_aware` is left out while it is off, so that files from before that setting existed can
    still be resumed.
    """
    used = (*names, *(("quant_aware",) if config.quant_aware != NONE else ()))
    return {name: getattr(config, name) for name in used}


def saved_step(path: Path, settings: str) -> int | None:
    """Steps done by a saved trainer. None when there is none. Raises ValueError for other
    settings."""
    if not path.exists():
        return None
    file = TensorFile(path)
    if file.text("settings") != settings:
        changed = _changed(settings_of(file), json.loads(settings))
        raise ValueError(
            f"{path} was trained with other settings ({changed}); use them, or another --run folder"
        )
    return step_of(file)


def saved_weights(path: Path, stage: str = "distill-depth") -> dict[str, torch.Tensor]:
    """Raises ValueError naming the stage that writes it when it is not there, or not finite."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; run {stage} first")
    file = TensorFile(path)
    weights = {
        n.removeprefix("weight."): file.read(n) for n in file.keys() if n.startswith("weight.")
    }
    check_finite(weights, path, f"remove the file and run {stage} again")
    return weights


def _changed(old_values: dict, new_values: dict) -> str:
    names = [
        name
        for name in {**new_values, **old_values}
        if old_values.get(name) != new_values.get(name)
    ]
    return (
        ", ".join(f"{name} {old_values.get(name)!r} -> {new_values.get(name)!r}" for name in names)
        or "format"
    )
