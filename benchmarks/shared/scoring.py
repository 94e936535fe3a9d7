"""What a pruned model of the demo's task is worth: what a reader reads, pictures and velocity
against the teacher's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ppcl_engine.algorithms.resampling import (
    mean_estimate,
    ratio_estimate,
    share_estimate,
    squares,
)
from ppcl_engine.data.calibration import CalibrationSet
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.rendered.captions import random_captions
from ppcl_engine.data.rendered.reader import Reading
from ppcl_engine.data.sampling import draw_prompts, encode_prompts
from ppcl_engine.models.weights import Weights
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

READINGS = ("character", "shape", "colour")
STEPS, GUIDANCE, BATCH, SEED = 20, 2.0, 50, 11
RESAMPLES = 2000


class Judge:
    """Draws the same captions from the same noise with every model; what the teacher drew is kept
    in `folder`. seed: of captions and noise."""

    def __init__(
        self,
        model: Path,
        teacher: nn.Module,
        validation: CalibrationSet,
        unseen: CalibrationSet,
        captions: int,
        folder: Path,
        steps: int = STEPS,
        seed: int = SEED,
    ):
        self.steps, self.seed = steps, seed
        self.architecture = Weights(model).architecture
        self.reading = Reading(open_codec(model), has_reader=True)
        generator = torch.Generator().manual_seed(seed)
        self.texts = [caption.text() for caption in random_captions(captions, generator)]
        self.prompts = encode_prompts(self.reading.codec, self.texts)
        path = folder / (
            f"teacher_{captions}.safetensors"
            if steps == STEPS
            else f"teacher_{captions}_{steps}.safetensors"
        )
        self.kept = path
        if not path.exists():
            write_tensors(
                path, {name: t.float() for name, t in self._draw(teacher, "teacher").items()}
            )
        self.teacher = TensorFile(path).read_all()
        self.validation, self.unseen = validation, unseen
        self.target, self.validation_target = (
            self._velocities(teacher, unseen),
            self._velocities(teacher, validation),
        )

    def velocity_error(self, model: nn.Module) -> dict:
        """Relative squared error on samples that nothing was trained on."""
        return ratio_estimate(*self.velocity_rows(model), SEED)

    def velocity_rows(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error and its own square of every unseen sample, each [samples]."""
        ours = self._velocities(model, self.unseen)
        return squares(ours - self.target), squares(self.target)

    def validation_error(self, model: nn.Module) -> float:
        """What a learning-rate search looks at: samples of its own, neither trained on nor
        scored."""
        error = self._velocities(model, self.validation) - self.validation_target
        return float(error.square().sum() / self.validation_target.square().sum())

    def target_batches(self) -> tuple[torch.Tensor, ...]:
        """The teacher's velocities on the unseen samples, batch by batch."""
        return self.target.split([len(batch["timestep"]) for batch in self.unseen.batches])

    def score(self, model: nn.Module, name: str, keep: Path | None = None) -> dict:
        """drop_percent with its interval, the accuracies, image distance and velocity error. keep: a
        file for what was read of each caption's picture."""
        ours = self._draw(model, name)
        if keep is not None:
            write_tensors(keep, {reading: ours[reading] for reading in READINGS})
        power = squares(self.teacher["latents"])
        distance = squares(ours["latents"] - self.teacher["latents"])
        accuracies = {f"{r}_accuracy": float(ours[r].double().mean()) for r in READINGS}
        return {
            **drop_percent(ours, self.teacher),
            **accuracies,
            "image_distance": float(distance.sum() / power.sum()),
            "velocity_error": self.velocity_error(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "captions": len(self.texts),
        }

    def _draw(self, model: nn.Module, name: str) -> dict[str, torch.Tensor]:
        latents = draw_prompts(
            self.architecture,
            model,
            self.prompts,
            self.seed,
            self.steps,
            GUIDANCE,
            BATCH,
            f"draw {name}",
        )
        pictures = torch.cat([self.reading.codec.pictures(part) for part in latents.split(BATCH)])
        return {
            "latents": latents,
            **{k: v.float() for k, v in self.reading.score(pictures, self.texts).items()},
        }

    def _velocities(self, model: nn.Module, samples: CalibrationSet) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(
                [self.architecture.call(model, row).double() for row in samples.all_inputs()]
            )


def mean_with_interval(values: list[float]) -> dict:
    return mean_estimate(torch.tensor(values, dtype=torch.float64), SEED)


def share_with_interval(share: float, count: int) -> dict:
    """The interval of a share of `count` answers, each either right or wrong."""
    return share_estimate(torch.arange(count) < round(count * share))


def drop_percent(ours: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor]) -> dict:
    """100 (1 - mean of the student / teacher ratios of the readings), with a 95 % bootstrap
    interval over captions (resampled together for student and teacher). Each reading is [captions]
    of zeros and ones."""
    count = len(teacher[READINGS[0]])
    least = 1 / count  # a resample in which the teacher reads nothing right would have no ratio
    choice = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(SEED))

    def drops(rows: torch.Tensor) -> torch.Tensor:
        ratios = [
            ours[r].double()[rows].mean(-1) / teacher[r].double()[rows].mean(-1).clamp(min=least)
            for r in READINGS
        ]
        return 100 * (1 - torch.stack(ratios).mean(0))

    low, high = torch.quantile(drops(choice), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {
        "drop_percent": float(drops(torch.arange(count))),
        "low": float(low),
        "high": float(high),
    }
