"""PPCL_CalibrateFromPrompts: a job in which the full model draws prompts, or edits pictures; what its
blocks see becomes the calibration."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ...ppcl_engine.settings.base_settings import Common
from ...ppcl_engine.settings.prune_settings import CalibrateConfig
from ..paths import NO_FOLDER, model_path, picture_folders, references_folder, teacher_files
from ..widgets import help_of, inputs
from . import results
from .base import JobNode
from .prompts import EncodedPrompts, Prompts, References


class CalibrateFromPrompts(JobNode):
    PICTURES = ()
    FIRST = (
        "model_file",
        "prompts",
        "samples",
        "steps",
        "guidance",
        "height",
        "width",
        "references",
    )
    FILES = {"model_file": model_path, "references": references_folder}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "CalibrateFromPrompts",
            "Calibrate from Prompts",
            "The full model draws these prompts; what its blocks see on the way is what later stages learn from.",
            [
                io.Combo.Input(
                    "model_file", options=teacher_files(), tooltip=help_of(Common, "model")
                ),
                io.String.Input(
                    "prompts", multiline=True, default="", tooltip="One prompt a line."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Text encoder, for a model file that brings none.",
                ),
                *inputs(
                    CalibrateConfig,
                    "samples batch empty_captions steps guidance height width",
                    samples={"min": 2},
                    batch={"min": 1},
                    empty_captions={"max": 1.0},
                    steps={"min": 1},
                ),
            ],
            presets=True,
            last=(
                io.Combo.Input(
                    "references",
                    options=[NO_FOLDER, *picture_folders()],
                    default=NO_FOLDER,
                    optional=True,
                    tooltip="Of an edit model: a folder in ComfyUI's input folder, of pictures with an instruction each in a "
                    ".txt of the same name. The full model changes them so.",
                ),
            ),
        )

    @classmethod
    def perform(
        cls, model_file, prompts, clip=None, references=NO_FOLDER, **given
    ) -> io.NodeOutput:
        source = source_of(prompts, clip, references)
        settings = {**given, source.setting: source.file}
        stages = [(CalibrateConfig, "calibrate", settings)]
        model = model_path(model_file)
        folder = cls.work("calibrate", stages, "", given, model, bring=source.write)
        return cls.output(folder, lambda f: [results.calibration_text(f)])


def source_of(prompts: str, clip, references: str) -> Prompts | EncodedPrompts | References:
    """What is drawn: words, encoded words, or pictures to edit. Raises ValueError where a node is
    given more than one of them."""
    folder = references_folder(references)
    if folder is None:
        return Prompts(prompts) if clip is None else Prompts(prompts).encoded(clip)
    if prompts.strip() or clip is not None:
        raise ValueError(
            "references bring their own instructions, and the model's own text encoder sees the pictures: leave prompts "
            "empty and clip unconnected"
        )
    return References(folder)
