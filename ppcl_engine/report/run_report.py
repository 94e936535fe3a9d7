"""The report of a run: report.html with everything in it, report.json, and the drawings as PNG
files."""

from __future__ import annotations

from pathlib import Path

from ..run import Run
from ..system.atomic import replacing, write_json, write_text
from .benchmark_sections import benchmark_sections, read_benchmarks
from .drawings import line_charts
from .drawings.damage_map import damage_map
from .drawings.layer_map import layer_map
from .drawings.picture_sheet import picture_sheet
from .page import page
from .results import FIDELITY, Results, read_results
from .width_section import site_rows, width_drawings

PLAIN = (
    "name",
    "parameters",
    "bytes",
    "flops",
    "seconds_per_step",
    "latency_ratio",
    "peak_memory_bytes",
)


def write_report(run: Path, seconds: float | None = None) -> Path:
    """Writes the report into the run folder `run` and returns its path. `seconds`: of the whole run.

    Raises ValueError if a stage that the report needs has not run.
    """
    files = Run(run)
    results = read_results(files)
    drawings = _drawings(results)
    for name, png in drawings.items():
        with replacing(files.folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    write_json(files.folder / "report.json", summary(results, seconds))
    benchmarks = benchmark_sections(files, read_benchmarks(files))
    write_text(files.report, page(results, drawings, seconds, benchmarks))
    return files.report


def _flat(row: dict) -> dict:
    """A row of the evaluation in plain numbers, a measure in three: value, low, high."""
    values = {name: row.get(name) for name in PLAIN}
    for name in FIDELITY:
        stat = row.get(name) or {}
        values |= {
            name: stat.get("value"),
            f"{name}_low": stat.get("low"),
            f"{name}_high": stat.get("high"),
        }
    return values


def summary(results: Results, seconds: float | None) -> dict:
    """report.json: plain numbers. `variants` are all but the teacher, each with the sites that are
    really on in it."""
    teacher, evaluation = results.teacher, results.evaluation
    layouts = results.layouts

    def student(row: dict) -> dict:
        variant, layout = results.plan.variant(row["name"]), layouts[row["name"]]
        parts = {
            "intervals": list(variant.intervals),
            "sites": list(layout.sites),
            "notes": list(layout.notes),
        }
        return {**_flat(row), **parts, "tuned": variant.tuned}

    return {
        "seconds": seconds,
        "teacher": _flat(teacher),
        "intervals": [
            {
                "first": i.first,
                "last": i.last,
                "stability": i.stability,
                "score": i.score,
                "parameters": i.parameters,
            }
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
    """File name without ending -> PNG. Drawings without data are left out."""
    plan, evaluation = results.plan, results.evaluation
    parameters = {v.name: v.parameters for v in plan.variants if v.parameters}
    parameters |= {row["name"]: row["parameters"] for row in evaluation["variants"]}
    drawings = {
        "layer_map": layer_map(plan, results.mapped, parameters, results.teacher["parameters"])
    }
    if plan.intervals:
        drawings["cka_curves"] = line_charts.cka_curves(plan, results.cka)
        drawings["damage_map"] = damage_map(plan, results.damage)
    if results.losses:
        drawings["loss_curves"] = line_charts.loss_curves(results.losses)
    if results.width:
        drawings |= width_drawings(results.width)
    by_timestep = {row["name"]: row["velocity_error_by_timestep"] for row in results.students}
    if any(by_timestep.values()):
        drawings["velocity_error"] = line_charts.velocity_errors(
            {name: rows for name, rows in by_timestep.items() if rows}
        )
    if evaluation["captions_shown"]:
        drawings["pictures"] = picture_sheet(
            results.pictured, evaluation["captions_shown"], results.pictures
        )
    return drawings
