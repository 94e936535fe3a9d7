"""PPCL_PruneModel: the whole method as one job, for somebody who says no more than a model, a size and
how much time there is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from comfy_api.v0_0_2 import io
from PIL import Image

from ...ppcl_engine.jobs.recipe import (
    RECIPE_FILE,
    Wish,
    brings_text_encoder,
    recipe,
    recipe_text,
    share_of,
)
from ...ppcl_engine.settings.base_settings import Common
from ...ppcl_engine.settings.convert_settings import ExportConfig
from ...ppcl_engine.settings.presets import QUALITIES
from ...ppcl_engine.stages import STAGES
from ...ppcl_engine.system.atomic import write_text
from ..paths import NO_FOLDER, model_path, runs, teacher_files
from ..widgets import check_file_name, help_of, inputs
from . import results
from .base import FileType, JobNode, check_device
from .budgets import budget_of, budget_picture, check_budget
from .calibrate_from_prompts import source_of
from .export import exported
from .waiting import in_words_of_widgets, screen_of

OF_ALL, GIGABYTES = "share of the model", "GB"


class PruneModel(JobNode):
    PICTURES = ("pictures", "layer map")
    FILES = {"model_file": model_path}
    FIRST = (
        "model_file",
        "prompts",
        "target",
        "target_in",
        "quality",
        "name",
        "size",
        "most_hours",
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "PruneModel",
            "Prune Model",
            "Makes a smaller model of a full one: all stages as one job. Says first what it takes.",
            [
                io.Combo.Input(
                    "model_file", options=teacher_files(), tooltip=help_of(Common, "model")
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt a line, as varied as what you will draw later. 24 or more.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Text encoder, for a model file that brings none.",
                ),
                *_target_inputs(),
                *inputs(ExportConfig, "name"),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=16_384,
                    step=16,
                    tooltip="Height and width of the pictures to learn from, in pixels; 0 is what is usual for the model.",
                ),
                io.Float.Input(
                    "most_hours",
                    default=24.0,
                    min=0.0,
                    max=10_000.0,
                    step=0.5,
                    tooltip="The job is not started if it would take longer here, as far as can be told before.",
                ),
            ],
            more=(
                FileType.Output(
                    display_name="file", tooltip="For file of Load Pruned Model (PPCL)."
                ),
            ),
            previews=True,
            decided=("dtype", "streamed"),
        )

    @classmethod
    def perform(
        cls, model_file, prompts, target, target_in, quality, name, size, most_hours, **given
    ) -> io.NodeOutput:
        check_device(given["device"])
        check_file_name(name)
        model, clip = model_path(model_file), given.pop("clip", None)
        source = source_of(prompts, clip, NO_FOLDER)
        if clip is None and not brings_text_encoder(model):
            raise ValueError(f"{model_file} brings no text encoder; connect one to clip")
        wanted = {"quality": quality, "name": name, "size": size, "seed": given["seed"]}
        wanted |= {"source": {source.setting: source.file}, "device": given["device"]}
        try:
            share = share_of(model, target) if target_in == GIGABYTES else target
            stages = recipe(Wish(model=model, share=share, **wanted), runs().root)
        except ValueError as error:
            raise ValueError(in_words_of_widgets(str(error))) from None

        def bring(folder: Path) -> None:
            source.write(folder)
            write_text(folder / RECIPE_FILE, recipe_text(stages, folder))

        kinds = [(STAGES[stage][0], stage, settings) for stage, settings in stages]
        check = partial(cls.show_budget, most_hours)
        folder = cls.work("prune", kinds, "", given, model, bring=bring, check=check)
        return cls.output(folder, _pruned)

    @classmethod
    def show_budget(cls, most_hours: float, folder: Path) -> None:
        """Shows what the job takes. Raises ValueError where that is too much."""
        budget, screen = budget_of(folder), screen_of(cls)
        screen.say(budget.line)
        (pixels,) = (budget_picture(budget) * 255).byte().numpy()
        screen.picture(Image.fromarray(np.ascontiguousarray(pixels)))
        check_budget(budget, most_hours)

    @classmethod
    def nothing(cls) -> list:
        return [""]


def _target_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "target",
            default=0.6,
            min=0.01,
            max=1000.0,
            step=0.01,
            tooltip="Size of the smallest variant; larger ones are in the same file.",
        ),
        io.Combo.Input(
            "target_in",
            options=[OF_ALL, GIGABYTES],
            default=OF_ALL,
            tooltip="What target is: a share of the full model's parameters, 0.3 to 0.95, or GB of weights in bfloat16.",
        ),
        io.Combo.Input(
            "quality",
            options=list(QUALITIES),
            default="good",
            tooltip="quick: what it will look like, roughly. good: a sixth of the paper's updates. paper: all of them. Turn "
            "start off to see what each takes here.",
        ),
    ]


def _pruned(folder: Path) -> list:
    return [results.drawn_picture(folder), *exported(folder)]
