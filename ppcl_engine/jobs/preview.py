"""preview.png: the loss so far, and pictures that the teacher and the model in training draw from the
same captions and noise.

It is drawn from files alone, between two steps of the stage, with random generators of its own, so that
the training gives the same bits with and without it.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..architectures import Architecture, Inputs
from ..data.calibration import load_calibration
from ..data.codecs import open_codec
from ..data.codecs.base import Codec
from ..data.codecs.table import has_tables
from ..data.sampling import Prompts, draw
from ..models.assembly import Students, assemble, open_variant
from ..models.layout import full_layout, sites_named
from ..models.surgery import filled_student
from ..models.weights import Weights
from ..plan import Interval, PruningPlan, Variant
from ..report.drawings.preview_sheet import LAYER_ERRORS, LOSSES, Row, sheet
from ..run import Run
from ..settings.convert_settings import AdaptLoraConfig, JobConfig, SparsifyConfig
from ..settings.prune_settings import (
    DetectConfig,
    DistillDepthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
)
from ..stages.run_students import RunStudents
from ..system.atomic import replacing
from ..system.machine import DTYPES, resolve_device
from ..system.progress import listening
from ..system.tensor_files import TensorFile
from .state import METRICS, PREVIEW
from .untrained import AXES, LEAST, damage_curve, untrained_sizes

PICTURES, STEPS = 4, 12
PICTURE_INPUTS = {"hidden_states", "timestep", "grid"}  # all other inputs are the caption's
SHARE = 10  # previews take at most one part in so many of the time
LARGEST = 2e9  # bytes of a model that is read a second time, to draw pictures
SEED = 0


def next_drawing(begun: float, now: float, seconds: float) -> float:
    """When the next preview is due, after one that took from `begun` to `now`; all times are seconds of
    one clock."""
    return now + max(seconds, SHARE * (now - begun))


class Preview:
    """Draws the preview whenever `draw` is called and it is time to; callers make sure that everything
    made so far is on disk."""

    def __init__(self, folder: Path, seconds: float, asked: Callable[[], bool]):
        self.folder = folder
        self.seconds = seconds
        """between two previews; 0 draws none"""
        self.asked = asked
        """whether the job has been asked to stop"""
        self.config: JobConfig | None = None
        """settings of the stage that is running; None before the first"""
        self._due = time.monotonic() + seconds
        self._painter: Painter | None = None

    def draw(self, finished: bool) -> bool:
        """Draws when it is time, and (`finished`) at the end of a stage that trained or pruned weights,
        or found a plan. Whether there is a new picture."""
        begun, config = time.monotonic(), self.config
        if config is None or not self.seconds or self.asked():
            return False
        due = finished or (begun >= self._due and not isinstance(config, DetectConfig))
        if type(config) not in {*TRAINING, *CURVES_ALONE, DetectConfig} or not due:
            return False
        with listening(None), torch.random.fork_rng(devices=[]), torch.no_grad():
            drawn = self._draw(config)
        self._due = next_drawing(begun, time.monotonic(), self.seconds)
        return drawn

    def _draw(self, config: JobConfig) -> bool:
        curves, axes = loss_curves(self.folder / METRICS), CURVES_ALONE.get(type(config), LOSSES)
        if isinstance(config, DetectConfig):
            curves, axes = {LEAST: damage_curve(config, Run(config.run))}, AXES
        try:
            rows = self._rows(config)
        except Enough:
            return False
        if not curves and not rows:
            return False
        picture = sheet(curves, rows, *axes)
        with replacing(self.folder / PREVIEW) as temporary:
            temporary.write_bytes(picture)
        return True

    def _rows(self, config: JobConfig) -> list[Row]:
        if type(config) in CURVES_ALONE:
            return []
        if self._painter is None and can_paint(config):
            self._painter = Painter(config, self.asked)
        if self._painter is None:
            return []
        if isinstance(config, DetectConfig):
            return self._painter.untrained_rows(config)
        return self._painter.rows(config)


class Enough(Exception):
    """The job was asked to stop while a picture was being drawn."""


def can_paint(config: JobConfig) -> bool:
    """Whether the model has a codec beside it, and is so small that reading it a second time costs
    little."""
    model = Path(config.model)
    files = [model] if model.is_file() else list((model / "transformer").glob("*.safetensors"))
    if sum(file.stat().st_size for file in files) > LARGEST:
        return False
    if model.is_file():
        return has_tables(model)
    return (model / "model_index.json").exists()


def _captioned(inputs: Inputs) -> torch.Tensor:
    """Indices of the samples whose caption is not empty; of the first one if all are. Without a mask
    that would tell, of all samples."""
    mask = inputs.get("encoder_hidden_states_mask")
    if mask is None:
        return torch.arange(len(inputs["hidden_states"]))
    captioned = mask.sum(1) > 1
    return captioned.nonzero()[:, 0] if captioned.any() else torch.arange(1)


class Painter:
    """Draws the same few captions of the calibration set with the teacher and with trained models."""

    def __init__(self, config: JobConfig, asked: Callable[[], bool]):
        self.asked, self.weights = asked, Weights(config.model)
        self.device, self.dtype = resolve_device(config.device), DTYPES[config.dtype]
        self.codec: Codec = open_codec(config.model, self.device)
        inputs = load_calibration(Run(config.run).calibration).inputs(0)
        chosen = _captioned(inputs)[:PICTURES]
        self.grid, shape = inputs["grid"], inputs["hidden_states"][chosen].shape
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        text = {
            name: tensor[chosen] for name, tensor in inputs.items() if name not in PICTURE_INPUTS
        }
        self.prompts = Prompts(
            positive=text,
            negative=text,  # not read without guidance
            latent_shape=(0, 0, 0),
            timesteps=self.codec.timesteps,
            rescales_guidance=self.codec.rescales_guidance,
        )
        layout = full_layout(self.weights.num_blocks)
        self.teacher = self._pictures(assemble(self.weights, None, layout, self.dtype, self.device))

    def rows(self, config: JobConfig) -> list[Row]:
        """The teacher's pictures and those of what the stage has trained so far; empty if that is
        nothing."""
        trained = trained_so_far(config, self.weights)
        if trained is None:
            return []
        model = open_variant(
            self.weights, trained.students, trained.plan, trained.variant, self.dtype, self.device
        )
        return [Row("teacher", self.teacher), Row(trained.label, self._pictures(model))]

    def untrained_rows(self, config: DetectConfig) -> list[Row]:
        """The teacher's pictures, and those of every size with students in closed form."""
        sizes = untrained_sizes(config, self.weights, self._go_on)
        if sizes is None:
            return []
        given = (self.weights, sizes.students, sizes.plan)
        models = (open_variant(*given, v, self.dtype, self.device) for v in sizes.variants)
        drawn = zip(sizes.variants, models, strict=True)
        return [
            Row("teacher", self.teacher),
            *(Row(sizes.label(variant), self._pictures(model)) for variant, model in drawn),
        ]

    def _go_on(self, *_) -> None:
        """Raises Enough if the job was asked to stop."""
        if self.asked():
            raise Enough

    def _pictures(self, model: nn.Module) -> torch.Tensor:
        """[n, 3, height, width] in [0, 1]"""
        architecture = self.weights.architecture
        clean = draw(
            architecture, model, self.noise, self.grid, self.prompts, STEPS, 1.0, self._go_on
        )
        pictures = self.codec.pictures(architecture.unpack(clean, self.grid))
        self.codec.release()
        return pictures


@dataclass(frozen=True)
class Trained:
    """What a stage has trained so far."""

    students: Students
    plan: PruningPlan
    variant: Variant
    """what of the plan is trained already"""
    label: str
    """of its row of pictures"""


def trained_so_far(config: JobConfig, weights: Weights) -> Trained | None:
    """What the stage has trained and saved; None if that is nothing."""
    run = Run(config.run)
    students = RunStudents(run, weights.config, weights.architecture, polished=False)
    return TRAINING[type(config)](config, run, run.load_plan(), students, weights.architecture)


def _depth(
    config: DistillDepthConfig,
    run: Run,
    plan: PruningPlan,
    students: Students,
    architecture: Architecture,
) -> Trained | None:
    plan = plan.with_parts(
        sites=(), variants=(), intervals=tuple(_as_trained(i, config, run) for i in plan.intervals)
    )
    names = tuple(i.name for i in plan.intervals if run.student(i.name).exists())
    label = f"student\n{len(names)} of {len(plan.intervals)}\nintervals"
    variant = Variant(name="present", intervals=names)
    return Trained(students, plan, variant, label) if names else None


def _as_trained(interval: Interval, config: DistillDepthConfig, run: Run) -> Interval:
    """The interval with the correction that its student has; the stage writes it into the plan only
    when it ends."""
    return (
        replace(interval, correction=config.correction)
        if run.student(interval.name).exists()
        else interval
    )


def _width(
    config: DistillWidthConfig,
    run: Run,
    plan: PruningPlan,
    students: Students,
    architecture: Architecture,
) -> Trained:
    if config.sites:
        plan = plan.with_parts(sites=sites_named(plan, config.sites, config.form), variants=())
    label = f"student\n{len(plan.sites)} width\nsites"
    return Trained(students, plan, plan.everything(), label)


def _polish(
    config: PolishConfig,
    run: Run,
    plan: PruningPlan,
    students: Students,
    architecture: Architecture,
) -> Trained | None:
    if not run.polish_state.exists():
        return None
    variant = plan.variant(config.variant) if config.variant else plan.everything()
    saved = Saved(run.polish_state, plan, architecture)
    return Trained(saved, plan, variant, "polished\nstudent")


def _finetune(
    config: FinetuneConfig,
    run: Run,
    plan: PruningPlan,
    students: Students,
    architecture: Architecture,
) -> Trained | None:
    source = plan.variant(config.variant)
    name = config.name or f"{source.name}_tuned"
    if not run.tuned_variant(name).exists():
        return None
    saved = Saved(run.tuned_variant(name), plan, architecture)
    tuned = replace(source, name=name, tuned=True)
    return Trained(saved, plan, tuned, f"{source.name}\nfine-tuned")


# stages of which only the curves are drawn, with the names of their axes
CURVES_ALONE: dict[type, tuple[str, str]] = {
    SparsifyConfig: LAYER_ERRORS,
    AdaptLoraConfig: LOSSES,
}
TRAINING: dict[type, Callable[..., Trained | None]] = {
    DistillDepthConfig: _depth,
    DistillWidthConfig: _width,
    PolishConfig: _polish,
    FinetuneConfig: _finetune,
}


class Saved:
    """The trained parts in the saved state of a polish or fine-tuning that still runs."""

    def __init__(self, path: Path, plan: PruningPlan, architecture: Architecture):
        self.file, self.plan, self.architecture = TensorFile(path), plan, architecture

    def student(self, interval: Interval, dtype: torch.dtype, device: str) -> nn.Module:
        state = self._under(f"weight.students.{interval.name}.", dtype, device)
        return filled_student(self.architecture, self.plan.config, interval, state)

    def projection(
        self, place: str, kind: str, dtype: torch.dtype, device: str
    ) -> dict[str, torch.Tensor]:
        return self._under(f"weight.projections.{place}:{kind}.", dtype, device)

    def tuned(self, variant: str, key: str) -> torch.Tensor:
        return self.file.read(f"weight.{key}")

    def _under(self, prefix: str, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
        names = [key for key in self.file.keys() if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.file.read(key).to(device, dtype) for key in names}


def loss_curves(path: Path) -> dict[str, dict[int, float]]:
    """name -> {update: loss} of the trainings of the kind that was measured last; of an update that was
    repeated, the last loss. Empty if nothing was measured."""
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == 4]
    curves: dict[str, dict[int, float]] = {}
    for _, what, step, loss in rows:
        if _kind(what) == _kind(rows[-1][1]):
            curves.setdefault(what, {})[int(step)] = float(loss)
    return curves


def _kind(what: str) -> str:
    """Which kind of training a name in metrics.csv belongs to. Names are "interval 3-4",
    "ffn_image of block 2" or a stage's; of a map that is being pruned, "layer attn.to_q"; of a LoRA that is
    being adapted, "place 3-4"."""
    first = what.split(" ")[0]
    return (
        first
        if first in ("interval", "layer", "place")
        else "site"
        if " of block " in what
        else what
    )
