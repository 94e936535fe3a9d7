"""The contents of a run folder, read once for its report."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..algorithms.distillation.saved_training import read_losses
from ..models.layout import Layout, layout_of
from ..plan import PruningPlan, Variant
from ..run import Run
from ..system.schemas import read_checked_object, read_json_text
from ..system.tensor_files import TensorFile
from .result_files import Detection, Evaluation
from .width_section import WidthResults, read_width

ACCURACIES = {
    "character_accuracy": "characters",
    "shape_accuracy": "shapes",
    "colour_accuracy": "colours",
}
FIDELITY = {
    "velocity_error": ("velocity error", "{:.4f}"),
    "latent_psnr": ("latents, PSNR dB", "{:.1f}"),
    "psnr": ("pictures, PSNR dB", "{:.1f}"),
    "ssim": ("pictures, SSIM", "{:.3f}"),
    "character_accuracy": ("characters right", "%"),
    "shape_accuracy": ("shapes right", "%"),
    "colour_accuracy": ("colours right", "%"),
    "text_sensitivity": ("text sensitivity", "{:.3f}"),
}


@dataclass(frozen=True)
class Results:
    """What a run folder holds, for its report."""

    plan: PruningPlan
    evaluation: dict
    """evaluate.json"""
    detection: dict
    """detect.json"""
    settings: dict
    """of the detection's curves"""
    calibration: dict
    """where the calibration set is from"""
    cka: torch.Tensor
    """[blocks, longest, 1 + resamples], as `Curves.cka`"""
    damage: torch.Tensor
    """[blocks, longest]: squared error of the velocity, relative to the teacher's"""
    losses: dict[str, torch.Tensor]
    """interval -> [updates]"""
    pictures: dict[str, torch.Tensor]
    """variant -> uint8 [captions, 3, height, width]"""
    width: WidthResults | None = None
    """None if no width was detected"""

    @property
    def layouts(self) -> dict[str, Layout]:
        """Variant of the layer map -> its layout: a site may be off because of an interval."""
        return {variant.name: layout_of(self.plan, variant) for variant in self.mapped}

    @property
    def mapped(self) -> list[Variant]:
        """The variants of the layer map: those evaluated, teacher first, then the plan's others."""
        names = [row["name"] for row in self.evaluation["variants"]]
        names += [v.name for v in self.plan.variants if v.name not in names]
        return [self.plan.variant(name) for name in names]

    @property
    def teacher(self) -> dict:
        return self.evaluation["variants"][0]

    @property
    def students(self) -> list[dict]:
        return self.evaluation["variants"][1:]

    @property
    def pictured(self) -> list[str]:
        return [row["name"] for row in self.evaluation["variants"] if row["name"] in self.pictures]

    def row(self, name: str) -> dict | None:
        return next((row for row in self.evaluation["variants"] if row["name"] == name), None)


def read_results(files: Run) -> Results:
    """Raises ValueError if a stage that the report needs has not run."""
    plan, shown = files.load_plan(), files.folder / "pictures.safetensors"
    for path in (files.evaluation, files.curves, files.detection, shown):
        if not path.exists():
            raise ValueError(f"{path} does not exist; run evaluate first")
    curves, evaluation = TensorFile(files.curves), read_checked_object(files.evaluation, Evaluation)
    for row in evaluation["variants"]:
        try:
            plan.variant(row["name"])
        except ValueError as error:
            raise ValueError(
                f"{files.evaluation} is older than the plan ({error}); run evaluate first"
            ) from None
    students = {
        i.name: files.student(i.name) for i in plan.intervals if files.student(i.name).exists()
    }
    losses = {name: read_losses(path) for name, path in students.items()}
    origin = TensorFile(files.calibration).metadata if files.calibration.exists() else {}
    return Results(
        plan=plan,
        evaluation=evaluation,
        detection=read_checked_object(files.detection, Detection),
        settings=read_json_text(curves.metadata.get("settings", "{}"), files.curves),
        calibration=read_json_text(origin.get("ppcl_calibration", "{}"), files.calibration),
        cka=curves.read("cka"),
        damage=curves.read("error").sum(-1) / curves.read("power").sum(),
        losses={name: values for name, values in losses.items() if len(values)},
        pictures=TensorFile(shown).read_all(),
        width=read_width(files, plan),
    )
