"""PPCL_Export: a job that writes the bundle, or one variant as a file of its own."""

from __future__ import annotations

from pathlib import Path

from comfy_api.v0_0_2 import io

from ...ppcl_engine.jobs.store import model_files_in
from ...ppcl_engine.models.storing import check_bits, check_store
from ...ppcl_engine.run import Run
from ...ppcl_engine.settings.assess_settings import EvaluateConfig
from ...ppcl_engine.settings.convert_settings import ExportConfig
from ...ppcl_engine.system.numbers import bytes_text
from ..paths import EXPORTS, exported_name
from ..widgets import check_file_name, help_of, inputs
from . import results
from .base import FileType, JobNode
from .runs import measured, run_input
from .waiting import in_words_of_widgets


class Export(JobNode):
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
            last=tuple(
                inputs(
                    ExportConfig,
                    "budget_gb refit",
                    budget_gb={"optional": True},
                    refit={"optional": True},
                )
            ),
        )

    @classmethod
    def perform(cls, run, report_pictures, **given) -> io.NodeOutput:
        check_file_name(given["name"])
        try:
            check_store(given["layout"], given["store"])
            # workflows saved before these two existed do not have them
            check_bits(
                given["layout"],
                given["store"],
                given.get("budget_gb", 0.0),
                given.get("refit", False),
            )
        except ValueError as error:
            raise ValueError(in_words_of_widgets(str(error))) from None
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
    file = model_files_in(folder / EXPORTS)[0]
    lines = [
        f"{exported_name(file)}: {bytes_text(file.stat().st_size)}",
        results.bits_text(file.with_suffix(".bits.json")),
        results.variants_text(plan),
        results.report_of(folder),
    ]
    return [
        results.map_picture(plan),
        "\n".join(line for line in lines if line),
        exported_name(file),
    ]
