"""PPCL_Probe and PPCL_Detect: jobs that measure the full model's blocks and find the plan."""

from __future__ import annotations

from pathlib import Path

from comfy_api.v0_0_2 import io

from ...ppcl_engine.report.drawings import line_charts
from ...ppcl_engine.run import Run
from ...ppcl_engine.settings.prune_settings import DetectConfig, ProbeConfig
from ..pictures import picture_of
from ..widgets import inputs
from . import results
from .base import JobNode
from .runs import run_input


class Probe(JobNode):
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
            states=True,
        )

    @classmethod
    def perform(cls, run, **given) -> io.NodeOutput:
        folder = cls.work(
            "detect", [(DetectConfig, "detect", given)], run, given, cls.ready(run, given)
        )
        return cls.output(folder, _detected)


def _detected(folder: Path) -> list:
    plan = Run(folder).load_plan()
    text = results.plan_text(plan, results.damage_table(folder))
    return [results.map_picture(plan), results.curves_picture(folder, plan), text]
