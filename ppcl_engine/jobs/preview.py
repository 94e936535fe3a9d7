"""preview.png: the loss so far, and pictures of the teacher and of what is trained, from the same
captions and noise.

Drawn from files alone, between two steps of the stage, with generators of its own: no bit of the
training changes.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..architectures import Architecture, Inputs
from ..data.calibration import load_calibration
from ..data.codecs import open_codec
from ..data.codecs.base import Codec
from ..data.codecs.table import TABLES
from ..data.draw import Prompts, draw
from ..models.assembly import Students, assemble, open_variant
from ..models.layout import full_layout
from ..models.surgery import filled_student
from ..models.weights import Weights
from ..plan import Interval, PruningPlan, Variant, parse_sites
from ..report.drawings.preview_sheet import LAYER_ERRORS, LOSSES, Row, sheet
from ..run import Run
from ..settings.base_settings import Common
from ..settings.convert_settings import SparsifyConfig
from ..settings.prune_settings import (
    DistillDepthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
)
from ..stages.inputs import RunStudents
from ..system.atomic import replacing
from ..system.machine import DTYPES, resolve_device
from ..system.progress import listening
from ..system.tensor_files import TensorFile
from .state import METRICS, PREVIEW

PICTURES, STEPS = 4, 12
PICTURE_INPUTS = {"hidden_states", "timestep", "grid"}  # all else is of the caption
SHARE = 10  # a preview takes a tenth of the time, at most
LARGEST = 2e9  # bytes of a model file that is read a second time for pictures
SEED = 0


def next_drawing(begun: float, now: float, seconds: float) -> float:
    """When the next preview is due, after one that took from `begun` to `now`, in seconds of one
    clock."""
    return now + max(seconds, SHARE * (now - begun))


class Preview:
    """`draw` is called where everything that was made is on disk; `config` is the present stage's.
    `asked`: to stop."""

    def __init__(self, folder: Path, seconds: float, asked: Callable[[], bool]):
        self.folder, self.seconds, self.asked = folder, seconds, asked
        self.config: Common | None = None
        self._due = time.monotonic() + seconds
        self._painter: Painter | None = None

    def draw(self, finished: bool) -> bool:
        """Whether there is a new picture: when it is time, and at the end of a stage that trained
        or pruned weights."""
        begun = time.monotonic()
        if not self.seconds or self.asked() or type(self.config) not in {*TRAINING, *CURVES_ALONE}:
            return False
        if not finished and begun < self._due:
            return False
        with listening(None), torch.random.fork_rng(devices=[]), torch.no_grad():
            drawn = self._draw()
        self._due = next_drawing(begun, time.monotonic(), self.seconds)
        return drawn

    def _draw(self) -> bool:
        curves = loss_curves(self.folder / METRICS)
        try:
            rows = self._rows()
        except Enough:
            return False
        if not curves and not rows:
            return False
        picture = sheet(curves, rows, *CURVES_ALONE.get(type(self.config), LOSSES))
        with replacing(self.folder / PREVIEW) as temporary:
            temporary.write_bytes(picture)
        return True

    def _rows(self) -> list[Row]:
        if type(self.config) in CURVES_ALONE:
            return []
        if self._painter is None and can_paint(self.config):
            self._painter = Painter(self.config, self.asked)
        return self._painter.rows(self.config) if self._painter is not None else []


class Enough(Exception):
    """Asked to stop while a picture is drawn."""


def can_paint(config: Common) -> bool:
    """Whether the model brings its codec and is so small that reading it a second time costs
    little."""
    model = Path(config.model)
    files = [model] if model.is_file() else list((model / "transformer").glob("*.safetensors"))
    if sum(file.stat().st_size for file in files) > LARGEST:
        return False
    if model.is_file():
        return set(TABLES) <= set(TensorFile(model).entries)
    return (model / "model_index.json").exists()


def _worded(inputs: Inputs) -> torch.Tensor:
    """Rows whose caption is not empty, as far as a mask shows it; else the first row."""
    mask = inputs.get("encoder_hidden_states_mask")
    if mask is None:
        return torch.arange(len(inputs["hidden_states"]))
    worded = mask.sum(1) > 1
    return worded.nonzero()[:, 0] if worded.any() else torch.arange(1)


class Painter:
    """Draws the same few captions of the calibration set with any model."""

    def __init__(self, config: Common, asked: Callable[[], bool]):
        self.asked, self.weights = asked, Weights(config.model)
        self.device, self.dtype = resolve_device(config.device), DTYPES[config.dtype]
        self.codec: Codec = open_codec(config.model, self.device)
        inputs = load_calibration(Run(config.run).calibration).inputs(0)
        chosen = _worded(inputs)[:PICTURES]
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

    def rows(self, config: Common) -> list[Row]:
        trained = present(config, self.weights)
        if trained is None:
            return []
        students, plan, variant, name = trained
        model = open_variant(self.weights, students, plan, variant, self.dtype, self.device)
        return [Row("teacher", self.teacher), Row(name, self._pictures(model))]

    def _pictures(self, model: nn.Module) -> torch.Tensor:
        """[n, 3, height, width] in [0, 1]"""

        def seen(step: int, x: torch.Tensor, t: float) -> None:
            if self.asked():
                raise Enough

        architecture = self.weights.architecture
        clean = draw(architecture, model, self.noise, self.grid, self.prompts, STEPS, 1.0, seen)
        pictures = self.codec.pictures(architecture.unpack(clean, self.grid))
        self.codec.release()
        return pictures


def present(config: Common, weights: Weights) -> tuple[Students, PruningPlan, Variant, str] | None:
    """What the stage has on disk: trained parts, their plan, what of it is on, its name. None when
    there is nothing."""
    run = Run(config.run)
    plan, students = (
        run.load_plan(),
        RunStudents(run, weights.config, weights.architecture, polished=False),
    )
    return TRAINING[type(config)](config, run, plan, students, weights.architecture)


def _depth(
    config: DistillDepthConfig,
    run: Run,
    plan: PruningPlan,
    students: Students,
    architecture: Architecture,
):
    plan = plan.with_parts(
        sites=(), variants=(), intervals=tuple(_as_trained(i, config, run) for i in plan.intervals)
    )
    names = tuple(i.name for i in plan.intervals if run.student(i.name).exists())
    on = f"student\n{len(names)} of {len(plan.intervals)}\nintervals"
    return (students, plan, Variant(name="present", intervals=names), on) if names else None


def _as_trained(interval: Interval, config: DistillDepthConfig, run: Run) -> Interval:
    """The plan learns of the correction only at the stage's end."""
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
):
    if config.sites:
        plan = plan.with_parts(sites=parse_sites(config.sites, config.form), variants=())
    return students, plan, plan.everything(), f"student\n{len(plan.sites)} width\nsites"


def _polish(
    config: PolishConfig,
    run: Run,
    plan: PruningPlan,
    students: Students,
    architecture: Architecture,
):
    if not run.polish_state.exists():
        return None
    variant = plan.variant(config.variant) if config.variant else plan.everything()
    return Saved(run.polish_state, plan, architecture), plan, variant, "polished\nstudent"


def _finetune(
    config: FinetuneConfig,
    run: Run,
    plan: PruningPlan,
    students: Students,
    architecture: Architecture,
):
    source = plan.variant(config.variant)
    name = config.name or f"{source.name}_tuned"
    if not run.tuned_variant(name).exists():
        return None
    saved = Saved(run.tuned_variant(name), plan, architecture)
    return saved, plan, replace(source, name=name, tuned=True), f"{source.name}\nfine-tuned"


CURVES_ALONE = {SparsifyConfig: LAYER_ERRORS}
TRAINING = {
    DistillDepthConfig: _depth,
    DistillWidthConfig: _width,
    PolishConfig: _polish,
    FinetuneConfig: _finetune,
}


class Saved:
    """Trained parts from the save of a polish or a fine-tuning that is not at its end."""

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
    """name -> {update: loss} of the kind of training that was measured last; an update that was
    done again counts once. Nothing where nothing was measured."""
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
    """Trainers name themselves "interval 3-4", "ffn_image of block 2", or the stage; maps that were
    pruned "layer attn.to_q"."""
    first = what.split(" ")[0]
    return first if first in ("interval", "layer") else "site" if " of block " in what else what
