"""PPCL_AdaptLora: a job that fits what a LoRA says of replaced blocks to what replaced them."""

from __future__ import annotations

from pathlib import Path

from comfy_api.v0_0_2 import io

from ...ppcl_engine.jobs.spec import read_spec
from ...ppcl_engine.models.lora_writing import ADAPTED
from ...ppcl_engine.run import Run
from ...ppcl_engine.settings.convert_settings import AdaptLoraConfig
from ...ppcl_engine.system.numbers import bytes_text
from ...ppcl_engine.system.tensor_files import TensorFile
from ..paths import adapted_lora, lora_files, lora_path
from ..widgets import check_file_name, inputs
from . import results
from .base import FileType, JobNode
from .runs import folder_of, run_input

STAGE = "adapt-lora"


class AdaptLora(JobNode):
    FILES = {**JobNode.FILES, "lora": lora_path}
    FIRST = ("lora", "variant", "name", "updates")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "AdaptLora",
            "Adapt LoRA",
            "Carries a LoRA of the full model over to a pruned variant: what belonged to replaced blocks is fitted to "
            "what replaced them.",
            [
                run_input(tooltip="A run of Distil Depth, Distil Width or Fine-tune (PPCL)."),
                io.Combo.Input(
                    "lora",
                    options=lora_files(),
                    tooltip="A file of models/loras, made for the full model.",
                ),
                *inputs(AdaptLoraConfig, "variant name rank updates learning_rate warm_up"),
            ],
            more=(
                FileType.Output(
                    display_name="lora",
                    tooltip="The adapted file in models/loras/ppcl, for lora_name of a LoRA loader.",
                ),
            ),
            previews=True,
            states=True,
            kind=AdaptLoraConfig,
        )

    @classmethod
    def perform(cls, run, lora, **given) -> io.NodeOutput:
        check_file_name(given["name"])
        model = cls.ready(run, given)
        Run(folder_of(run)).load_plan().variant(given["variant"])
        settings = {**given, "lora": str(lora_path(lora))}
        folder = cls.work("lora", [(AdaptLoraConfig, STAGE, settings)], run, given, model)
        return cls.output(folder, _adapted)

    @classmethod
    def nothing(cls) -> list:
        return [""]


def _adapted(folder: Path) -> list:
    settings = dict(read_spec(folder).stages)[STAGE]
    run = Run(folder)
    file = run.lora(settings["name"])
    name = adapted_lora(folder.name, file)
    places = TensorFile(file).about(ADAPTED)["losses"]
    lines = [f"{name}: {bytes_text(file.stat().st_size)}"]
    lines += [
        f"{place}: loss {found['first']:.3g} as the LoRA was, {found['reached']:.3g} adapted"
        for place, found in places.items()
    ]
    losses = results.losses_of(folder, str(run.lora_fits.relative_to(folder) / settings["name"]))
    return [results.training_picture(folder, losses), "\n".join(lines), name]
