"""A run on the tiny teacher with students and width projections of every kind, made by hand:
nothing is trained."""

from __future__ import annotations

import copy
import math
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ppcl_engine.algorithms.distillation.trainer import Training
from ppcl_engine.algorithms.distillation.tuning import AveragedTrainer
from ppcl_engine.models.assembly import open_variant
from ppcl_engine.models.surgery import build_student
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import Interval, PruningPlan, Variant, WidthSite
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import FinetuneConfig
from ppcl_engine.stages.prune.finetune import finetune
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.tensor_files import write_tensors

DEPTH = (
    Interval(first=1, last=2, correction="affine"),
    Interval(first=3, last=4, correction="none"),
)
WIDTH = (
    WidthSite(block=0, kind="ffn_text"),
    WidthSite(block=1, kind="ffn_image", fitted=("1",)),
    WidthSite(block=3, kind="ffn_image", form="gated", fitted=("3",)),
    WidthSite(block=3, kind="text", fitted=("3",)),
    WidthSite(block=4, kind="text", fitted=("4",)),
)
PROJECTIONS = {
    ("0", "ffn_text"): ("map",),
    ("1", "ffn_image"): ("map",),
    ("1-2", "ffn_image"): ("map",),
    ("3", "ffn_image"): ("map",),
    ("3-4", "ffn_image"): ("map",),
    ("3", "text"): ("map",),
    ("4", "text"): ("map", "step"),
    ("3-4", "text"): ("map", "step"),
}
SMALL, SMALLEST = ("1-2", "3-4"), ("ffn_text:0", "ffn_image:1", "ffn_image:3", "text:3-4")


@dataclass(frozen=True, kw_only=True)
class PlanParts:
    """What a plan has: its intervals, sites, the projections of each place, and its variants."""

    depth: tuple[Interval, ...] = DEPTH
    width: tuple[WidthSite, ...] = WIDTH
    projections: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=lambda: PROJECTIONS)
    variants: tuple[Variant, ...] = (
        Variant(name="small", intervals=SMALL),
        Variant(name="smallest", intervals=SMALL, sites=SMALLEST),
    )


def write_parts(
    run: Run, teacher_file: Path, width: bool = True, parts: PlanParts | None = None
) -> PruningPlan:
    """Students: copies of their first block, corrections and projections at random and small."""
    parts = parts or PlanParts()
    weights, generator = Weights(teacher_file), torch.Generator().manual_seed(0)
    for interval in parts.depth:
        student = build_student(weights.architecture, weights.config, interval)
        block = weights.block(interval.first, torch.float32, "cpu").state_dict()
        own = {
            n: _small(t.shape, generator) for n, t in student.state_dict().items() if n not in block
        }
        _write(run.student(interval.name), {**copy.deepcopy(block), **own})
    d = weights.architecture.width(weights.config)
    for (place, kind), names in parts.projections.items() if width else ():
        maps = nn.ModuleDict({part: nn.Linear(d, d) for part in names}).state_dict()
        _write(
            run.projection(place, kind), {n: _small(t.shape, generator) for n, t in maps.items()}
        )
    plan = PruningPlan(
        architecture=weights.architecture.name,
        config=weights.config,
        num_blocks=weights.num_blocks,
        fingerprint=weights.fingerprint,
        intervals=parts.depth,
        sites=parts.width if width else (),
        variants=parts.variants if width else parts.variants[:1],
    )
    run.plan.write_text(plan.to_json())
    return plan


def tuned_run(folder: Path, teacher_file: Path) -> Run:
    """With these parts and "smallest" fine-tuned for two steps; `folder` holds a calibration
    set."""
    run = Run(folder)
    write_parts(run, teacher_file)
    settings = {"variant": "smallest", "steps": 2, "learning_rate": 1e-2, "warm_up": 1}
    finetune(FinetuneConfig(model=teacher_file, run=run.folder, device="cpu", **settings))
    return run


def _small(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def _write(path: Path, state: dict[str, torch.Tensor]) -> None:
    write_tensors(
        path,
        {f"weight.{name}": tensor for name, tensor in state.items()},
        {"settings": "{}", "step": "0"},
    )


def stop_after(monkeypatch, step: int, how) -> None:
    """Calls `how` once, when a training on the velocity has done this many steps and before it may
    save them."""
    update, done = AveragedTrainer.update, []

    def stopping(self, *arguments):
        update(self, *arguments)
        if self.step == step and not done:
            done.append(True)
            how()

    monkeypatch.setattr(AveragedTrainer, "update", stopping)


def poison(monkeypatch, step: int) -> None:
    """The loss of this step of every training is NaN."""
    check = Training.check_finite

    def poisoned(self, what, value, where):
        check(self, what, math.nan if what == "loss" and self.step == step else value, where)

    monkeypatch.setattr(Training, "check_finite", poisoned)


def control_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def killed() -> None:
    raise SystemError("killed")


def files_of(run: Run, *patterns: str) -> dict[str, bytes]:
    return {
        str(p.relative_to(run.folder)): p.read_bytes()
        for pattern in patterns
        for p in run.folder.glob(pattern)
    }


def velocities(run: Run, teacher_file: Path, rows: list, *names: str) -> dict[str, torch.Tensor]:
    """The velocities of some variants of the run's plan, each opened as a model of its own."""
    weights, plan = Weights(teacher_file), run.load_plan()
    students, found = RunStudents(run, weights.config, weights.architecture), {}
    for name in names:
        model = open_variant(weights, students, plan, plan.variant(name), torch.float32, "cpu")
        with torch.no_grad():
            found[name] = torch.cat([weights.architecture.call(model, row) for row in rows])
    return found
