"""PPCL_FoldModel: writes a file of a model whose timestep modulations are folded away."""

from __future__ import annotations

import tempfile
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from comfy_api.v0_0_2 import io

from ...ppcl_engine.architectures.folded import FORMS
from ...ppcl_engine.models.bundle import is_bundle
from ...ppcl_engine.settings.convert_settings import FoldConfig
from ...ppcl_engine.settings.help_texts import setting_help
from ...ppcl_engine.stages.convert.fold import fold
from ...ppcl_engine.system.atomic import read_json
from ...ppcl_engine.system.numbers import bytes_text
from ...ppcl_engine.system.progress import listening
from ..node import Node
from ..paths import NO_BASE, base_path, files_of_the_engine, model_path, written_folder
from ..widgets import check_file_name

PRECISIONS = ("bfloat16", "float32")
NAME = "folded"


class HostProgress:
    """A listener that shows the engine's progress on the host's bar and lets its Cancel end the work."""

    def __init__(self):
        self.bar = None

    def advanced(self, what: str, step: int, steps: int | None, rate: float | None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if steps:
            self.bar = self.bar or comfy.utils.ProgressBar(steps)
            self.bar.update_absolute(step, steps)

    def measured(self, what: str, step: int, loss: float) -> None:
        """Nothing is trained."""

    def saved(self) -> None:
        """Nothing is trained."""


def write(
    file: Path,
    base: Path | None,
    form: str,
    name: str,
    bound: float,
    sigmas,
    precision: str,
    samples: str,
) -> str:
    """Writes the folded files to models/ppcl; returns what they are, in words. Raises ValueError, in
    one line, for a model that cannot be folded and for a name that is taken."""
    check_file_name(name)
    if form == "table" and sigmas is None:
        raise ValueError(
            "a table needs the sigmas it is made for; connect the scheduler that you sample with"
        )
    folder = written_folder()
    wanted = [
        f"{name}{ending}" for ending in (".safetensors", ".ppcl.safetensors", "_base.safetensors")
    ]
    if taken := [one for one in wanted if (folder / one).exists()]:
        raise ValueError(f"{taken[0]} is in models/ppcl already; choose another name, or delete it")
    timesteps = (
        "" if sigmas is None else " ".join(f"{float(sigma):.9g}" for sigma in sigmas if sigma > 0)
    )
    read = {"timesteps": timesteps, "samples": samples} if form == "table" else {"bound": bound}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fold") as run, listening(HostProgress()):
        path = fold(
            FoldConfig(
                path=file,
                base=base,
                form=form,
                name=name,
                run=Path(run),
                **read,
                dtype=precision,
                host="comfyui",
                device=str(comfy.model_management.get_torch_device()),
            )
        )
        written = [
            one.replace(folder / one.name) for one in sorted(path.parent.glob("*.safetensors"))
        ]
        return described(written, read_json(Path(run) / f"{name}.json"))


def described(written: list[Path], report: dict) -> str:
    before, after = (
        sum(size[key] for size in report["sizes"]) for key in ("bytes", "folded_bytes")
    )
    lines = [
        f"{' and '.join(path.name for path in written)} in models/ppcl: {bytes_text(after)}, before {bytes_text(before)}"
    ]
    if "rank" in report:
        row = next(row for row in report["curve"] if row["rank"] == report["rank"])
        lines.append(
            f"basis of rank {row['rank']}: error {row['mean']:.2%} mean, {row['worst']:.2%} worst"
        )
    else:
        lines.append(
            f"table of {len(report['timesteps'])} timesteps, {bytes_text(report['table_bytes'])}: no error"
        )
    return "\n".join(lines)


class FoldModel(Node):
    FILES = {"file": model_path, "base": base_path}

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = files_of_the_engine()
        return io.Schema(
            node_id="PPCL_FoldModel",
            display_name="Fold Model (PPCL)",
            category="PPCL",
            description="Writes a model a third smaller: the parts that only tell the time become a table or a few numbers.",
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files,
                    tooltip="A full model, a pruned one in one file, or a bundle.",
                ),
                io.Combo.Input(
                    "base",
                    options=[NO_BASE, *files],
                    tooltip="Of a bundle: the full model it was made from.",
                ),
                io.Combo.Input(
                    "form", options=list(FORMS), tooltip=setting_help(FoldConfig, "form")
                ),
                io.String.Input("name", default=NAME, tooltip=setting_help(FoldConfig, "name")),
                io.Float.Input(
                    "bound",
                    default=FoldConfig.bound,
                    min=0.001,
                    max=0.5,
                    step=0.001,
                    tooltip=setting_help(FoldConfig, "bound"),
                ),
                io.Combo.Input(
                    "precision", options=list(PRECISIONS), tooltip=setting_help(FoldConfig, "dtype")
                ),
                io.String.Input(
                    "samples",
                    default=FoldConfig.samples,
                    tooltip=setting_help(FoldConfig, "samples"),
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Of a table: the schedule it is made for, from any scheduler node.",
                ),
            ],
            outputs=[io.String.Output(display_name="text")],
        )

    @classmethod
    def perform(
        cls, file, base, form, name, bound, precision, samples, sigmas=None
    ) -> io.NodeOutput:
        path, full = model_path(file), base_path(base)
        if full is not None and not is_bundle(path):
            raise ValueError(
                f"{path.name} is not a bundle, so it takes no base model; set base to none"
            )
        with torch.inference_mode(False):
            return io.NodeOutput(write(path, full, form, name, bound, sigmas, precision, samples))
