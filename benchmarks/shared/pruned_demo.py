"""The demo's bundle and its judge, which several benchmarks prune and quantise further."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

import ppcl_engine.demo
from ppcl_engine.algorithms.distillation.quantization import NONE, simulated
from ppcl_engine.algorithms.resampling import ratio_estimate
from ppcl_engine.algorithms.sparsity.grams import EARLY, EVEN, Grams
from ppcl_engine.data.calibration import CalibrationSet
from ppcl_engine.data.rendered.tables import fit_codec
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights

from . import output
from .pruned_layers import collect
from .scoring import SEED, Judge, share_with_interval
from .teachers import BUNDLED, NARROW, random_teacher, rendered

DEMO = Path(ppcl_engine.demo.__file__).parent / "demo.ppcl.safetensors"
SAMPLES, UNSEEN, BATCH, CAPTIONS, STEPS = 240, 240, 48, 100, 10


@dataclass(eq=False)
class Context:
    path: Path
    teacher: Teacher
    calibration: CalibrationSet
    unseen: CalibrationSet
    folder: Path
    judge: Judge

    @cached_property
    def grams(self) -> dict[str, list[Grams]]:
        found = {
            scheme: collect(self.teacher, self.calibration, scheme) for scheme in (EVEN, EARLY)
        }
        return {**found, "unseen": collect(self.teacher, self.unseen, EVEN)}


def judged(context: Context, model: nn.Module, name: str) -> dict:
    """How the whole model does: what is read in its pictures, and the error of its velocity."""
    error, power = context.judge.velocity_rows(model)
    scored = context.judge.score(model, name)
    return {
        "drop": {"value": scored["drop_percent"], "low": scored["low"], "high": scored["high"]},
        "characters": share_with_interval(scored["character_accuracy"], scored["captions"]),
        "velocity_rows": (error / power.sum() * len(power)).tolist(),
        "velocity_error": ratio_estimate(error, power, SEED),
        "image_distance": scored["image_distance"],
    }


def prepare(chosen, blocks: int = 1) -> Context:
    """`blocks`: of a quick run's random teacher."""
    path = chosen.teacher or BUNDLED
    if chosen.quick and chosen.teacher is None:
        path = Path(chosen.work) / "teacher.safetensors"
        random_teacher(
            path, {**NARROW, "num_layers": blocks}, seed=0, codec=fit_codec(0, samples=16)
        )
    weights = Weights(path)
    folder = Path(chosen.work) / weights.fingerprint[:8]
    teacher = Teacher(weights, torch.float32, "cpu", streamed=False)
    samples, captions, steps = (
        (8, 4, 2) if chosen.quick else (SAMPLES, chosen.captions or CAPTIONS, STEPS)
    )
    batch = min(BATCH, samples)
    calibration, unseen, others = (
        rendered(path, weights, samples, batch, seed=seed) for seed in (0, 1, 2)
    )
    folder.mkdir(parents=True, exist_ok=True)
    judge = Judge(
        path,
        open_model(path),
        replace(unseen, batches=unseen.batches[:1]),
        others,
        captions,
        folder,
        steps,
    )
    return Context(path, teacher, calibration, unseen, folder, judge)


def options(name: str, description: str) -> ArgumentParser:
    """What the benchmarks that `prepare` alike have in common."""
    parser = output.options(name, description)
    parser.add_argument(
        "--teacher", type=Path, help="default: the bundled one; of a quick run a tiny random one"
    )
    parser.add_argument(
        "--work", type=Path, help="where rows that are done are kept (default runs/sparsity)"
    )
    parser.add_argument(
        "--captions", type=int, default=0, help=f"captions drawn a row (default {CAPTIONS})"
    )
    return parser


def parse(parser: ArgumentParser, arguments: list[str] | None) -> Namespace:
    chosen = output.parse(parser, arguments)
    chosen.work = chosen.work or Path("runs/sparsity_quick" if chosen.quick else "runs/sparsity")
    return chosen


def quantised(model: nn.Module, kind: str, blocks: tuple[str, ...] = ("",)) -> nn.Module:
    """The model, with the linear maps of its blocks rounded; `blocks`: beginnings of their
    names."""
    for name, module in model.named_modules():
        if (
            kind != NONE
            and isinstance(module, nn.Linear)
            and "blocks." in name
            and name.startswith(blocks)
        ):
            module.weight.data = simulated(module.weight, kind)
    return model
