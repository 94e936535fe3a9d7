"""PPCL_DistillDepth, PPCL_DistillWidth and PPCL_FineTune: jobs that train the pruned model's parts."""

from __future__ import annotations

from pathlib import Path

from comfy_api.v0_0_2 import io

from ...ppcl_engine.plan import parse_intervals
from ...ppcl_engine.run import Run
from ...ppcl_engine.settings.base_settings import TrainingConfig
from ...ppcl_engine.settings.prune_settings import (
    DetectWidthConfig,
    DistillDepthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
)
from ..widgets import check_file_name, inputs
from . import results
from .base import JobNode
from .runs import folder_of, measured, run_input

SHARE, NAMED, PLANNED = "by share", "by name", "as planned"
POLISH = {"polish_steps": "steps", "polish_learning_rate": "learning_rate"}
"""name of a widget -> of the setting of PolishConfig"""


class DistillDepth(JobNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "DistillDepth",
            "Distil Depth",
            "Trains one student an interval of the plan, each by itself.",
            [
                run_input(tooltip="A run of Detect (PPCL) or Edit Plan (PPCL)."),
                *inputs(
                    DistillDepthConfig,
                    "rounds updates learning_rate intervals correction init loss warm_up weight_decay cache_gb",
                    rounds={"min": 1},
                    updates={"min": 1},
                ),
            ],
            previews=True,
            states=True,
            last=(_quant_aware_input(),),
        )

    @classmethod
    def perform(cls, run, **given) -> io.NodeOutput:
        model = cls.ready(run, given)
        plan = Run(folder_of(run)).load_plan()
        for interval in parse_intervals(given["intervals"]):
            plan.interval(interval.name)
        folder = cls.work(
            "depth", [(DistillDepthConfig, "distill-depth", given)], run, given, model
        )
        return cls.output(folder, lambda f: _trained(f, "depth"))


def _trained(folder: Path, kind: str) -> list:
    losses = results.losses_of(folder, kind)
    return [results.training_picture(folder, losses), results.losses_text(losses)]


class DistillWidth(JobNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "DistillWidth",
            "Distil Width",
            "Finds FFNs and text streams that linear maps can replace, trains those, then all parts together.",
            [
                run_input(tooltip="A run of Distil Depth (PPCL)."),
                io.Combo.Input(
                    "choose",
                    options=[SHARE, NAMED, PLANNED],
                    default=SHARE,
                    tooltip="Width sites: searched for until the share is met, named in sites, or those of Edit Plan.",
                ),
                *inputs(DetectWidthConfig, "share", share={"min": 0.05, "max": 1.0}),
                io.String.Input(
                    "sites", default="", tooltip='For "by name": as "ffn_image:2 text:51-59".'
                ),
                *inputs(DetectWidthConfig, "form longest", longest={"min": 1, "max": 64}),
                *inputs(
                    DistillWidthConfig,
                    "rounds updates learning_rate give_back warm_up cache_gb",
                    updates={"min": 1},
                ),
                *(_polish_input(name) for name in POLISH),
            ],
            previews=True,
            states=True,
            last=(_quant_aware_input(),),
        )

    @classmethod
    def perform(cls, run, choose, polish_steps, polish_learning_rate, **given) -> io.NodeOutput:
        model = cls.ready(run, given)
        stages = [*_width_stages(choose, given)]
        if polish_steps:
            polish = {
                "steps": polish_steps,
                "learning_rate": polish_learning_rate,
                **_given(given, "quant_aware"),
            }
            stages.append((PolishConfig, "polish", polish))
        folder = cls.work("width", stages, run, given, model)
        return cls.output(folder, _widened)


def _polish_input(name: str) -> io.Input:
    """A widget of PolishConfig by another name, since the node has settings of these names already."""
    (widget,) = inputs(PolishConfig, POLISH[name], steps={"default": 300, "min": 0})
    widget.id = name
    widget.tooltip = (
        f"Of the training of all parts together afterwards; 0 steps leaves it out. {widget.tooltip}"
    )
    return widget


def _quant_aware_input() -> io.Input:
    (widget,) = inputs(TrainingConfig, "quant_aware", quant_aware={"optional": True})
    return widget


def _given(given: dict, name: str) -> dict:
    """A value that workflows saved before its setting existed do not have."""
    return {name: given[name]} if name in given else {}


def _width_stages(choose: str, given: dict) -> list[tuple[type, str, dict]]:
    """The stages that find and train width sites, in the three ways that the widget offers."""
    names = ["rounds", "updates", "learning_rate", "give_back", "warm_up", "cache_gb"]
    tokens = _given(given, "target_tokens_only")
    distill = {**tokens, **_given(given, "quant_aware"), **{name: given[name] for name in names}}
    if choose == NAMED:
        if not given["sites"].strip():
            raise ValueError(
                f"choose is {NAMED!r}, but sites is empty; write them as 'ffn_image:2 text:51-59'"
            )
        form = "paper" if given["form"] == "best" else given["form"]
        distill |= {"sites": given["sites"], "form": form}
        return [(DistillWidthConfig, "distill-width", distill)]
    if choose == PLANNED:
        return [(DistillWidthConfig, "distill-width", distill)]
    if choose != SHARE:
        raise ValueError(
            f"choose {choose!r} is not a choice; choose from {SHARE}, {NAMED}, {PLANNED}"
        )
    detect = {**tokens, **{name: given[name] for name in ("share", "form", "longest", "cache_gb")}}
    return [
        (DetectWidthConfig, "detect-width", detect),
        (DistillWidthConfig, "distill-width", distill),
    ]


def _widened(folder: Path) -> list:
    picture, _ = _trained(folder, "width")
    return [picture, results.plan_text(Run(folder).load_plan(), None)]


class FineTune(JobNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "FineTune",
            "Fine-tune",
            "Trains all parameters of one variant against the full model; one more variant.",
            [
                run_input(tooltip="A run of Distil Depth (PPCL) or Distil Width (PPCL)."),
                *inputs(
                    FinetuneConfig,
                    "variant name steps learning_rate warm_up weight_decay ema data checkpointing save_every",
                    steps={"min": 1},
                    save_every={"min": 1},
                    ema={"max": 0.9999, "step": 0.0001},
                ),
            ],
            previews=True,
            last=(
                *inputs(
                    FinetuneConfig,
                    "offload optimizer_state",
                    offload={"optional": True},
                    optimizer_state={"optional": True},
                ),
                _quant_aware_input(),
            ),
        )

    @classmethod
    def perform(cls, run, **given) -> io.NodeOutput:
        check_file_name(given["name"] or "unnamed")
        model = cls.ready(run, given)
        stages = [*measured(run), (FinetuneConfig, "finetune", given)]
        return cls.output(cls.work("tuned", stages, run, given, model), _tuned)


def _tuned(folder: Path) -> list:
    picture, _ = _trained(folder, "tuned")
    return [picture, results.variants_text(Run(folder).load_plan())]
