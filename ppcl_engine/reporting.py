"""The report of a run: report.html, which stands alone, report.json, and the pictures beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from . import charts
from . import pictures as draw
from .files import TensorFile, read_json, replacing, write_json, write_text
from .layout import Layout, layout_of
from .plan import PruningPlan, Variant
from .report_page import FIDELITY, page
from .report_width import WidthResults, read_width, site_rows, width_drawings
from .run import Run


@dataclass(frozen=True)
class Results:
    """What a run folder says, read once. cka, damage: see stages.detect.Curves; losses: interval -> [updates]."""

    plan: PruningPlan
    evaluation: dict
    detection: dict
    settings: dict
    calibration: dict
    cka: torch.Tensor
    damage: torch.Tensor
    losses: dict[str, torch.Tensor]
    pictures: dict[str, torch.Tensor]
    width: WidthResults | None = None

    @property
    def layouts(self) -> dict[str, Layout]:
        """What is really on in each variant of the layer map."""
        return {variant.name: layout_of(self.plan, variant) for variant in self.mapped}

    @property
    def mapped(self) -> list[Variant]:
        """Those evaluated, teacher first, then those that the plan names besides."""
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


def write_report(run: Path, seconds: float | None = None) -> Path:
    """Writes the report into the run folder `run` and returns its path. `seconds`: what the whole run took.

    Raises ValueError when a stage that it reads from has not run.
    """
    files = Run(run)
    results = _read(files)
    drawings = _drawings(results)
    for name, png in drawings.items():
        with replacing(files.folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    write_json(files.folder / "report.json", summary(results, seconds))
    write_text(files.report, page(results, drawings, seconds))
    return files.report


def _read(files: Run) -> Results:
    plan, shown = files.load_plan(), files.folder / "pictures.safetensors"
    for path in (files.evaluation, files.curves, files.detection, shown):
        if not path.exists():
            raise ValueError(f"{path} does not exist; run evaluate first")
    curves, evaluation = TensorFile(files.curves), read_json(files.evaluation)
    for row in evaluation["variants"]:
        try:
            plan.variant(row["name"])
        except ValueError as error:
            raise ValueError(f"{files.evaluation} is older than the plan ({error}); run evaluate first") from None
    students = {i.name: files.student(i.name) for i in plan.intervals if files.student(i.name).exists()}
    losses = {name: TensorFile(path).read("losses") for name, path in students.items()}
    origin = TensorFile(files.calibration).metadata if files.calibration.exists() else {}
    return Results(
        plan=plan,
        evaluation=evaluation,
        detection=read_json(files.detection),
        settings=json.loads(curves.metadata.get("settings", "{}")),
        calibration=json.loads(origin.get("ppcl_calibration", "{}")),
        cka=curves.read("cka"),
        damage=curves.read("error").sum(-1) / curves.read("power").sum(),
        losses={name: values for name, values in losses.items() if len(values)},
        pictures=TensorFile(shown).read_all(),
        width=read_width(files, plan),
    )


def summary(results: Results, seconds: float | None) -> dict:
    """report.json: plain numbers; `variants` are all but the teacher itself, with the sites that are really on."""
    teacher, evaluation = results.teacher, results.evaluation
    plain = ("name", "parameters", "bytes", "flops", "seconds_per_step", "latency_ratio", "peak_memory_bytes")

    layouts = results.layouts

    def flat(row: dict) -> dict:
        values = {name: row.get(name) for name in plain}
        for name in FIDELITY:
            stat = row.get(name) or {}
            values |= {name: stat.get("value"), f"{name}_low": stat.get("low"), f"{name}_high": stat.get("high")}
        return values

    def student(row: dict) -> dict:
        variant, layout = results.plan.variant(row["name"]), layouts[row["name"]]
        parts = {"intervals": list(variant.intervals), "sites": list(layout.sites), "notes": list(layout.notes)}
        return {**flat(row), **parts, "tuned": variant.tuned}

    return {
        "seconds": seconds,
        "teacher": flat(teacher),
        "intervals": [
            {"first": i.first, "last": i.last, "stability": i.stability, "score": i.score, "parameters": i.parameters}
            for i in results.plan.intervals
        ],
        "sites": site_rows(results.plan),
        "variants": [student(row) for row in results.students],
        "num_blocks": results.plan.num_blocks,
        **{
            name: evaluation.get(name)
            for name in ("captions", "steps", "guidance", "seed", "device", "machine", "versions")
        },
        "evaluate_seconds": evaluation.get("seconds"),
    }


def _drawings(results: Results) -> dict[str, bytes]:
    """File name without ending -> PNG. What has no data is left out."""
    plan, evaluation = results.plan, results.evaluation
    parameters = {v.name: v.parameters for v in plan.variants if v.parameters}
    parameters |= {row["name"]: row["parameters"] for row in evaluation["variants"]}
    drawings = {"layer_map": draw.layer_map(plan, results.mapped, parameters, results.teacher["parameters"])}
    if plan.intervals:
        drawings["cka_curves"] = charts.cka_curves(plan, results.cka)
        drawings["damage_map"] = draw.damage_map(plan, results.damage)
    if results.losses:
        drawings["loss_curves"] = charts.loss_curves(results.losses)
    if results.width:
        drawings |= width_drawings(results.width)
    by_timestep = {row["name"]: row["velocity_error_by_timestep"] for row in results.students}
    if any(by_timestep.values()):
        drawings["velocity_error"] = charts.velocity_errors({name: rows for name, rows in by_timestep.items() if rows})
    if evaluation["captions_shown"]:
        drawings["pictures"] = draw.picture_sheet(results.pictured, evaluation["captions_shown"], results.pictures)
    return drawings
