"""Fewer weights, fewer bits, or both: a bundled teacher's files of equal bytes, by the error of their velocity.

Pruned only: the named variants in 16 bits. In bits only: the whole teacher with a format for each matrix.
Both: intervals and formats under one budget. The last two with weights as they are and refitted. Errors are of samples that nothing was fitted
on, with 95 % bootstrap intervals over them; differences are of the same samples. Rows that are done are
read from `runs/bits`, so an interrupted run goes on.
"""

from __future__ import annotations

import time
from argparse import BooleanOptionalAction, Namespace
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from ppcl_engine.algorithms.resampling import ratio_estimate, squares
from ppcl_engine.data.calibration import CalibrationSet, load_calibration, save_calibration
from ppcl_engine.data.rendered.tables import fit_codec
from ppcl_engine.demo.run import LEARNING_RATE, REMOVE
from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.bundle_contents import PROJECTION, student_prefix
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import FULL
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.settings.prune_settings import (
    DetectConfig,
    DistillDepthConfig,
    ProbeConfig,
    VariantsConfig,
)
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.prune.detect import detect
from ppcl_engine.stages.prune.distill_depth import distill_depth
from ppcl_engine.stages.prune.probe import probe
from ppcl_engine.stages.prune.variants import variants
from ppcl_engine.system.atomic import read_json, write_json, write_text
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from .shared import output
from .shared.pruned_demo import BATCH, DEMO
from .shared.scoring import SEED, mean_with_interval
from .shared.teachers import BUNDLED, NARROW, describe, random_teacher, rendered

SHARES = (0.38, 0.33)  # of the full file in 16 bits: budgets that no pruning alone meets
ROUNDS, LONGEST = 12, 6  # of students, where the teacher has no bundle
PRUNED, BITS, BOTH = "pruned only", "bits only", "intervals and bits"
NAMED = ("small", "smallest")
SAMPLES, UNSEEN = 96, 240


@dataclass(eq=False)
class Context:
    path: Path
    weights: Weights
    run: Run
    unseen: CalibrationSet
    chosen: Namespace

    def __post_init__(self):
        self.target = self.velocities(self.path)

    @torch.no_grad()
    def velocities(self, path: Path) -> torch.Tensor:
        model, call = open_model(path), self.weights.architecture.call
        return torch.cat([call(model, row).double() for row in self.unseen.all_inputs()])


def prepare(chosen) -> Context:
    path = chosen.teacher or BUNDLED
    if chosen.quick and chosen.teacher is None:
        path = chosen.work / "teacher.safetensors"
        random_teacher(path, {**NARROW, "num_layers": 4}, seed=0, codec=fit_codec(0, samples=16))
    weights = Weights(path)
    samples, unseen = (8, 8) if chosen.quick else (chosen.samples, chosen.unseen)
    run = Run(chosen.work / f"{weights.fingerprint[:8]}_{samples}_{unseen}")
    batch = min(BATCH, samples // 2)
    if not run.calibration.exists():
        save_calibration(run.calibration, rendered(path, weights, samples, batch, seed=0))
    if Bundle(DEMO).plan.fingerprint == weights.fingerprint:
        _unpack(DEMO, run)
    else:
        _prune(path, run, weights, chosen.quick)
    unseen_samples = rendered(path, weights, unseen, batch, seed=1)
    return Context(path, weights, run, unseen_samples, chosen)


def _unpack(path: Path, run: Run) -> None:
    """The parts of a bundle as a run folder has them."""
    bundle, file = Bundle(path), TensorFile(path)
    for interval in bundle.plan.intervals:
        _save(run.student(interval.name), file, student_prefix(interval))
    for place, kind in {
        (match[1], match[2]) for match in map(PROJECTION.fullmatch, file.keys()) if match
    }:
        _save(run.projection(place, kind), file, f"projections.{place}.{kind}.")
    write_text(run.plan, bundle.plan.to_json())


def _save(path: Path, file: TensorFile, prefix: str) -> None:
    tensors = {
        f"weight.{name.removeprefix(prefix)}": file.read(name)
        for name in file.keys()
        if name.startswith(prefix)
    }
    write_tensors(path, tensors, {"settings": "{}", "step": "0"})


def _prune(path: Path, run: Run, weights: Weights, quick: bool) -> None:
    """Students of a teacher without a bundle, trained for a short while; kept once made."""
    common = {"model": path, "run": run.folder, "device": "cpu"}
    if run.plan.exists() and run.load_plan().variants:
        return
    probe(ProbeConfig(**common))
    longest, remove = (2, 1) if quick else (LONGEST, REMOVE["flux"])
    detect(DetectConfig(**common, longest=longest, remove=remove, bootstrap=0, method="budget"))
    rounds = 1 if quick else ROUNDS
    distill_depth(DistillDepthConfig(**common, rounds=rounds, learning_rate=LEARNING_RATE))
    variants(VariantsConfig(**common))


def measured(context: Context, name: str, **settings) -> dict | None:
    """A file's bytes and its error; None where no file is small enough."""
    path = context.run.folder / "rows" / f"{name}.json"
    if not path.exists():
        start = time.monotonic()
        values = _measure(context, name, settings)
        write_json(path, {"row": values, "seconds": time.monotonic() - start})
    values = read_json(path)["row"]
    about = f"{values['velocity_error']['value']:.5f}" if values else "does not fit"
    print(f"\n{name}: velocity error {about}", flush=True)
    return values


def _measure(context: Context, name: str, settings: dict) -> dict | None:
    config = ExportConfig(
        **{"model": context.path, "run": context.run.folder, "device": "cpu", "layout": "ppcl"},
        **{"name": name, **settings},
    )
    try:
        file = export(config)
    except ValueError as error:
        if "is too small" not in str(error):
            raise
        return None
    error, power = squares(context.velocities(file) - context.target), squares(context.target)
    report = file.with_suffix(".bits.json")
    chosen = read_json(report) if report.exists() else {}
    values = {
        "bytes": file.stat().st_size,
        "velocity_error": ratio_estimate(error, power, SEED),
        "velocity_rows": (error / power.sum() * len(power)).tolist(),
        **{
            key: chosen[key]
            for key in ("matrices", "intervals", "predicted_damage")
            if key in chosen
        },
    }
    file.unlink()
    return values


def rows_of(context: Context) -> list[dict]:
    """Pruned only: each named size. The others: in the bytes of the smallest of these, and in fewer."""
    plan = context.run.load_plan()
    sizes = [("none", FULL), *((PRUNED, v.name) for v in plan.variants if v.name in NAMED)]
    rows = []
    for method, variant in sizes:
        found = measured(context, variant, variant=variant, store="bfloat16")
        assert found is not None
        about = {"method": method, "variant": variant, "budget": found["bytes"], "refit": False}
        rows.append({**about, **found})
    shares = SHARES[:1] if context.chosen.quick else context.chosen.shares
    budgets = [rows[-1]["bytes"], *(round(share * rows[0]["bytes"]) for share in shares)]
    for refit, budget in product((False, True) if context.chosen.refit else (False,), budgets):
        for method, variant in ((BOTH, "auto"), (BITS, FULL)):
            label = f"{variant}_{budget}{'_refit' if refit else ''}"
            given = {"variant": variant, "budget_gb": budget / 1e9, "refit": refit}
            found = measured(context, label, store="mixed", **given) or {}
            about = {"method": method, "variant": variant, "budget": budget, "refit": refit}
            rows.append({**about, **found})
    return rows


def differences(rows: list[dict]) -> list[dict]:
    """Both under one budget minus bits only, at the same bytes; and refitted minus plain."""
    by_key = {(r["method"], r["budget"], r["refit"]): r for r in rows if "velocity_rows" in r}
    found = []
    for (method, budget, refit), row in by_key.items():
        pairs = {}
        if method == BOTH:
            pairs[f"{BOTH} - {BITS}"] = by_key.get((BITS, budget, refit))
        if refit:
            pairs[f"refit - plain, {method}"] = by_key.get((method, budget, False))
        for name, other in pairs.items():
            if other:
                each = zip(row["velocity_rows"], other["velocity_rows"], strict=True)
                change = mean_with_interval([a - b for a, b in each])
                found.append({"name": name, "budget": budget, "refit": refit, **change})
    return found


def run(chosen) -> dict:
    context = prepare(chosen)
    rows = rows_of(context)
    compared = differences(rows)
    for row in rows:
        row.pop("velocity_rows", None)
    teacher = describe(context.path, context.weights)
    counts = {
        "samples": load_calibration(context.run.calibration).samples,
        "unseen": len(context.target),
    }
    return {"rows": rows, "differences": compared, "teacher": teacher, **counts}


def show(values: dict) -> None:
    lines = []
    for row in values["rows"]:
        error = row.get("velocity_error")
        cell = "does not fit"
        if error:
            cell = f"{error['value']:.5f} ({error['low']:.5f} - {error['high']:.5f})"
        size = f"{row['bytes'] / 1e6:.2f}" if error else "-"
        name = f"{row['budget'] / 1e6:.2f} MB: {row['method']}{', refit' if row['refit'] else ''}"
        lines.append((name, size, " ".join(row.get("intervals", [])) or "-", cell))
    output.print_table("bits", ("budget: model", "MB", "replaced", "velocity error"), lines)
    lines = [
        (
            f"{d['budget'] / 1e6:.2f} MB: {d['name']}{', refit' if d['refit'] else ''}",
            f"{d['value']:+.5f} ({d['low']:+.5f} to {d['high']:+.5f})",
        )
        for d in values["differences"]
    ]
    output.print_table("differences", ("budget: models", "velocity error"), lines)


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("bits", __doc__)
    parser.add_argument("--teacher", type=Path, help="default: the bundled Qwen-Image one")
    parser.add_argument(
        "--work", type=Path, help="where files and rows are kept (default runs/bits)"
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="that formats are measured on")
    parser.add_argument("--unseen", type=int, default=UNSEEN, help="samples that errors are of")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="*",
        default=SHARES,
        help="budgets below the smallest pruned file, of the full file's bytes",
    )
    parser.add_argument(
        "--refit", action=BooleanOptionalAction, default=True, help="rows with refitted weights too"
    )
    chosen = output.parse(parser, arguments)
    chosen.work = chosen.work or Path("runs/bits_quick" if chosen.quick else "runs/bits")
    values = run(chosen)
    show(values)
    return output.write("bits", chosen, values)


if __name__ == "__main__":
    main()
