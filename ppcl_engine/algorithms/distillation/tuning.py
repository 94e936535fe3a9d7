"""Training on the final velocity that `polish` and `finetune` share: averaged weights, precision,
saves, stopping.

Every batch is a function of (seed, step), so a training that goes on from its last save ends in the
same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from ...data.calibration import CalibrationSet
from ...settings.base_settings import TuningConfig
from ...system.distributed import processes
from ...system.interruption import stop_on_interrupt
from ...system.json_text import json_text
from ...system.progress import Progress, saved
from ...system.seeds import draw_seed
from ...system.tensor_files import TensorFile, file_mark
from .loop import Session, train_until
from .saved_training import settings_of
from .sharding import like
from .trainer import Trainer, resume_settings, saved_step

SETTINGS = ("steps", "learning_rate", "warm_up", "weight_decay", "ema", "seed", "dtype")


class AveragedTrainer(Trainer):
    """A Trainer that also keeps an exponential moving average of the weights, which is what is
    used.

    Its decay is min(ema, (1 + step) / (10 + step)), so that early weights are soon forgotten; ema 0
    averages nothing. A parameter without a gradient in a step stays as it is, so each counts its
    own updates.
    """

    def __init__(self, module: nn.Module, weight_decay: float, ema: float):
        super().__init__(module, weight_decay)
        self.ema = ema
        self.average = (
            {name: p.detach().clone() for name, p in module.named_parameters()} if ema else {}
        )

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(self.ema, (1 + step) / (10 + step))
        for name, parameter in self.module.named_parameters():
            self.average[name].lerp_(parameter, 1 - decay)

    def update(self, loss: torch.Tensor, learning_rate: float, where: str) -> None:
        super().update(loss, learning_rate, where)
        if self.ema:
            self._average(self.step - 1)

    def used(self) -> dict[str, torch.Tensor]:
        """The module's tensors as they are to be used: averaged where there is an average."""
        return {**self.module.state_dict(), **self.average}

    def tensors(self) -> dict[str, torch.Tensor]:
        """As a Trainer's, `weight.` being what is used and `raw.` what is trained on; `counts`:
        updates a parameter."""
        parameters = dict(self.module.named_parameters())
        counts = [
            float(self.optimizer.state.get(p, {}).get("step", 0)) for p in parameters.values()
        ]
        return {
            **super().tensors(),
            **{f"weight.{name}": tensor for name, tensor in self.used().items()},
            **{f"raw.{name}": parameters[name].detach() for name in self.average},
            "counts": torch.tensor(counts),
        }

    def load(self, file: TensorFile) -> None:
        super().load(file)
        counts = file.read("counts")
        for (name, parameter), count in zip(self.module.named_parameters(), counts, strict=True):
            if name in self.average:
                self.average[name].copy_(like(file.read(f"weight.{name}"), parameter))
                parameter.data.copy_(like(file.read(f"raw.{name}"), parameter))
            if parameter in self.optimizer.state:
                self.optimizer.state[parameter]["step"] = count.clone()


def tune(
    trainer: AveragedTrainer,
    loss_at: Callable[[int], torch.Tensor],
    config: TuningConfig,
    path: Path,
    settings: str,
    what: str,
) -> int:
    """Trains to `config.steps`, on from what is saved in `path`; returns the steps done before.
    `loss_at(step)`.

    Raises Stopped on Ctrl-C after saving, and Diverged (a ValueError) with the last saved state
    kept.
    """
    before = saved_step(path, settings) or 0
    if before:
        trainer.restore(path)
    progress = Progress(total=config.steps, initial=before, desc=what, unit="step")

    def save() -> None:
        trainer.save(path, settings)
        saved()

    with stop_on_interrupt() as asked, progress:
        session = Session(rates=config, steps=config.steps, progress=progress, stop_asked=asked)
        while trainer.step < config.steps:
            next_save = (trainer.step // config.save_every + 1) * config.save_every
            train_until(min(next_save, config.steps), trainer, loss_at, what, session, save)
            save()
    return before


def tuning_settings(
    config: TuningConfig, calibration: CalibrationSet, sources: Iterable[Path], **more
) -> str:
    """The settings that decide a training's result. `sources`: the files of the parts that it
    starts from."""
    marks = {path.name: file_mark(path) for path in sources}
    return json_text(
        {
            **resume_settings(config, SETTINGS),
            **more,
            "calibration": calibration.hash[:16],
            "sources": marks,
        }
    )


def forget_if_stale(path: Path, settings: str) -> None:
    """Removes a saved training that started from the same parts, which have been trained anew
    since."""
    if processes().writes and path.exists():
        old, new = settings_of(TensorFile(path)).get("sources"), json.loads(settings)["sources"]
        if isinstance(old, dict) and old.keys() == new.keys() and old != new:
            path.unlink()
    processes().wait()


def step_draw(config: TuningConfig, calibration: CalibrationSet, step: int) -> tuple[int, int]:
    """(batch, seed) for `CalibrationSet.fresh`: the batches in turn, each time with new noise and
    timesteps."""
    return step % len(calibration), draw_seed(config.seed, step)
