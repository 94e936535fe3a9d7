"""PPCL_Probe and PPCL_Detect: jobs that measure the full model's blocks and find the plan."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy_api.v0_0_2 import io

from ...ppcl_engine.jobs.spec import configs, read_spec
from ...ppcl_engine.jobs.state import PREVIEW
from ...ppcl_engine.jobs.untrained import AXES, LEAST, damage_curve
from ...ppcl_engine.report.drawings import line_charts
from ...ppcl_engine.report.drawings.canvas import QUIET
from ...ppcl_engine.report.drawings.preview_sheet import sheet
from ...ppcl_engine.run import Run
from ...ppcl_engine.settings.prune_settings import DetectConfig, ProbeConfig
from ..pictures import picture_of, text_card
from ..widgets import inputs
from . import results
from .base import JobNode
from .runs import run_input

POINTS = 8  # of the damage curve, in the text


class Probe(JobNode):
    FIRST = ("train_steps",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Probe",
            "Probe",
            "Fits a linear map to every block of the full model: what Detect needs.",
            [
                run_input(tooltip="A calibration: recorded, or from prompts."),
                io.Latent.Input(
                    "after",
                    optional=True,
                    tooltip="Of a recording: connect the sampler's latent, so that it is drawn before this runs.",
                ),
                *inputs(
                    ProbeConfig, "ridge train_steps learning_rate held_out", held_out={"min": 1}
                ),
            ],
            seed=False,
            states=True,
            presets=True,
        )

    @classmethod
    def perform(cls, run, after=None, **given) -> io.NodeOutput:
        folder = cls.work(
            "probe", [(ProbeConfig, "probe", given)], run, given, cls.ready(run, given)
        )
        return cls.output(folder, _probed)


def _probed(folder: Path) -> list:
    errors = results.probe_errors(folder)
    return [picture_of(line_charts.probe_chart(errors)), results.probe_text(errors)]


class Detect(JobNode):
    PICTURES = ("layer map", "curves")
    SHOWN = -1
    FIRST = ("method", "remove", "longest", "samples")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Detect",
            "Detect",
            "Finds the runs of blocks that one student each can replace: the plan.",
            [
                run_input(tooltip="A run of Probe (PPCL)."),
                *inputs(
                    DetectConfig,
                    "method remove longest protect samples tokens bootstrap eps max_drop",
                    longest={"min": 2, "max": 64},
                    samples={"min": 2},
                    tokens={"min": 1},
                    bootstrap={"max": 10_000},
                ),
            ],
            more=(
                io.Image.Output(
                    display_name="untrained",
                    tooltip="The damage of every number of blocks; what each size draws before any training.",
                ),
            ),
            states=True,
            presets=True,
        )

    @classmethod
    def perform(cls, run, **given) -> io.NodeOutput:
        folder = cls.work(
            "detect", [(DetectConfig, "detect", given)], run, given, cls.ready(run, given)
        )
        return cls.output(folder, _detected)

    @classmethod
    def nothing(cls) -> list:
        return [text_card("Not detected yet.", QUIET)]


def _detected(folder: Path) -> list:
    plan = Run(folder).load_plan()
    curve = damage_curve(_config_of(folder), Run(folder))
    text = [results.plan_text(plan, results.damage_table(folder))]
    text += [_points(curve)] if curve else []
    pictures = [results.map_picture(plan), results.curves_picture(folder, plan)]
    return [*pictures, "\n".join(text), _untrained(folder, curve)]


def _config_of(folder: Path) -> DetectConfig:
    return next(c for _, c in configs(read_spec(folder), folder) if isinstance(c, DetectConfig))


def _points(curve: dict[int, float]) -> str:
    """Some points of the curve in a line, among which an artist chooses `remove`."""
    step = max(1, len(curve) // POINTS)
    chosen = list(curve.items())[step - 1 :: step][:POINTS]
    return "least damage by remove: " + ", ".join(f"{n}: {damage:.2g}" for n, damage in chosen)


def _untrained(folder: Path, curve: dict[int, float]) -> torch.Tensor:
    """What the job drew when it was done; of one without a preview, the curve alone."""
    if (folder / PREVIEW).exists():
        return picture_of((folder / PREVIEW).read_bytes())
    return picture_of(sheet({LEAST: curve}, [], *AXES))
