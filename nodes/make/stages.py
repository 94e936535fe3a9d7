"""The stages of the method as nodes: each prepares a run, starts it in a process of its own and
waits for it.

A node gives the run to the next one, a picture and a short text. Nothing of a MODEL enters: a run
names the file.
"""

from __future__ import annotations

from pathlib import Path

from comfy_api.v0_0_2 import io

from ...ppcl_engine.plan import parse_intervals
from ...ppcl_engine.report.drawings import line_charts
from ...ppcl_engine.run import Run
from ...ppcl_engine.settings.assess_settings import EvaluateConfig
from ...ppcl_engine.settings.base_settings import Common
from ...ppcl_engine.settings.convert_settings import ExportConfig
from ...ppcl_engine.settings.prune_settings import (
    CalibrateConfig,
    DetectConfig,
    DetectWidthConfig,
    DistillDepthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
    ProbeConfig,
    VariantsConfig,
)
from ..paths import (
    NO_FOLDER,
    exported_name,
    model_path,
    picture_folders,
    references_folder,
    teacher_files,
)
from ..pictures import picture_of
from ..widgets import check_file_name, help_of, inputs
from . import results
from .base import FileType, Job
from .prompts import EncodedPrompts, Prompts, References
from .runs import folder_of, run_input

SHARE, NAMED, PLANNED = "by share", "by name", "as planned"
POLISH = {"polish_steps": "steps", "polish_learning_rate": "learning_rate"}


class CalibrateFromPrompts(Job):
    PICTURES = ()
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
        folder = cls.work(
            "calibrate",
            [(CalibrateConfig, "calibrate", settings)],
            "",
            given,
            model_path(model_file),
            bring=source.write,
        )
        return cls.output(folder, lambda f: [results.calibration_text(f)])


def source_of(prompts: str, clip, references: str) -> Prompts | EncodedPrompts | References:
    """Raises ValueError for more than one."""
    folder = references_folder(references)
    if folder is None:
        return Prompts(prompts) if clip is None else Prompts(prompts).encoded(clip)
    if prompts.strip() or clip is not None:
        raise ValueError(
            "references bring their own instructions, and the model's own text encoder sees the pictures: leave prompts "
            "empty and clip unconnected"
        )
    return References(folder)


class Probe(Job):
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


class Detect(Job):
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


class DistillDepth(Job):
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


class DistillWidth(Job):
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
        )

    @classmethod
    def perform(cls, run, choose, polish_steps, polish_learning_rate, **given) -> io.NodeOutput:
        model = cls.ready(run, given)
        stages = [*_width_stages(choose, given)]
        if polish_steps:
            polish = {"steps": polish_steps, "learning_rate": polish_learning_rate}
            stages.append((PolishConfig, "polish", polish))
        folder = cls.work("width", stages, run, given, model)
        return cls.output(folder, _widened)


def _polish_input(name: str) -> io.Input:
    """PolishConfig's, by another name: the node has steps and rates of its own."""
    (widget,) = inputs(PolishConfig, POLISH[name], steps={"default": 300})
    widget.id = name
    widget.tooltip = (
        f"Of the training of all parts together behind it; 0 steps leaves it out. {widget.tooltip}"
    )
    return widget


def _width_stages(choose: str, given: dict) -> list[tuple[type, str, dict]]:
    names = ["rounds", "updates", "learning_rate", "give_back", "warm_up", "cache_gb"]
    # workflows of before have none
    tokens = {name: given[name] for name in ("target_tokens_only",) if name in given}
    distill = {**tokens, **{name: given[name] for name in names}}
    if choose == NAMED:
        if not given["sites"].strip():
            raise ValueError(
                f"choose is {NAMED!r}, but sites is empty; write them as 'ffn_image:2 text:51-59'"
            )
        form = "paper" if given["form"] == "best" else given["form"]
        return [
            (
                DistillWidthConfig,
                "distill-width",
                {**distill, "sites": given["sites"], "form": form},
            )
        ]
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


class FineTune(Job):
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
        )

    @classmethod
    def perform(cls, run, **given) -> io.NodeOutput:
        check_file_name(given["name"] or "unnamed")
        model = cls.ready(run, given)
        stages = [*measured(run), (FinetuneConfig, "finetune", given)]
        return cls.output(cls.work("tuned", stages, run, given, model), _tuned)


def measured(run: str) -> list:
    """The stage that measures the variants, unless the run before has them."""
    plan = Run(folder_of(run)).load_plan()
    return (
        []
        if any(not variant.tuned for variant in plan.variants)
        else [(VariantsConfig, "variants", {})]
    )


def _tuned(folder: Path) -> list:
    picture, _ = _trained(folder, "tuned")
    return [picture, results.variants_text(Run(folder).load_plan())]


class Export(Job):
    PICTURES = ("layer map",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Export",
            "Export",
            "Measures the variants and writes the bundle, or one variant as a file of its own.",
            [
                run_input(tooltip="A run of Distil Depth, Distil Width or Fine-tune (PPCL)."),
                *inputs(ExportConfig, "layout name variant store"),
                io.Int.Input(
                    "report_pictures",
                    default=0,
                    min=0,
                    max=10_000,
                    tooltip=f"Also compares all variants with the full model (report.html). {help_of(EvaluateConfig, 'captions')} "
                    "0 writes no report.",
                ),
            ],
            more=(
                FileType.Output(
                    display_name="file", tooltip="For file of Load Pruned Model (PPCL)."
                ),
            ),
            seed=False,
        )

    @classmethod
    def perform(cls, run, report_pictures, **given) -> io.NodeOutput:
        check_file_name(given["name"])
        model = cls.ready(run, given)
        stages = [*measured(run), (ExportConfig, "export", given)]
        if report_pictures:
            stages.append((EvaluateConfig, "evaluate", {"captions": report_pictures}))
        return cls.output(cls.work("export", stages, run, given, model), _exported)

    @classmethod
    def nothing(cls) -> list:
        return [""]


def _exported(folder: Path) -> list:
    plan = Run(folder).load_plan()
    file = sorted((folder / "exports").rglob("*.safetensors"))[0]
    lines = [
        f"{exported_name(file)}: {file.stat().st_size / 1e9:.4g} GB",
        results.variants_text(plan),
        results.report_of(folder),
    ]
    return [
        results.map_picture(plan),
        "\n".join(line for line in lines if line),
        exported_name(file),
    ]
