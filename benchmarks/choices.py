"""What a student should start as, learn from and be followed by: equal updates, one change at a
time.

The settings of distil-depth are chosen from this table. Damage: squared error of the final velocity
relative to the teacher's, on samples that no student saw, with 95 % bootstrap intervals; `joint`
with all intervals replaced, `singles` the sum over intervals replaced one by one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from ppcl_engine.algorithms.detection.damage import Damage
from ppcl_engine.algorithms.resampling import ratio_estimate
from ppcl_engine.data.calibration import save_calibration
from ppcl_engine.models.layout import layout_of
from ppcl_engine.plan import Variant
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import DetectConfig, DistillDepthConfig, ProbeConfig
from ppcl_engine.stages.inputs import open_plan, open_teacher
from ppcl_engine.stages.prune.detect import detect
from ppcl_engine.stages.prune.distill_depth import distill_depth
from ppcl_engine.stages.prune.probe import probe
from ppcl_engine.stages.run_students import RunStudents

from .shared import output, teachers

PAPER = {"init": "first", "correction": "none", "loss": "direction"}
ROWS = {
    "paper: first, direction": {},
    "init middle (authors' code)": {"init": "middle"},
    "direction + log norm": {"loss": "direction_log_norm"},
    "relative MSE": {"loss": "mse"},
    "affine, direction": {"correction": "affine"},
    "affine, direction + log norm": {"correction": "affine", "loss": "direction_log_norm"},
    "affine, relative MSE": {"correction": "affine", "loss": "mse"},
    "rank 16, relative MSE": {"correction": "16", "loss": "mse"},
}
LEARNING_RATES = (3e-3,)
SAMPLES, HELD_OUT, BATCH = 480, 240, 48


def measure(chosen) -> dict:
    model = chosen.teacher
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        common = {"model": model, "run": folder / "base", "device": "cpu"}
        teacher = open_teacher(ProbeConfig(**common))
        samples, held_out = (SAMPLES, HELD_OUT) if not chosen.quick else (96, 96)
        base = Run(folder / "base")
        save_calibration(
            base.calibration, teachers.rendered(model, teacher.weights, samples, BATCH, seed=0)
        )
        unseen = teachers.rendered(model, teacher.weights, held_out, BATCH, seed=1).all_inputs()
        probe(ProbeConfig(**common))
        detect(DetectConfig(**common, bootstrap=0))
        untrained = [
            _row(name, {**PAPER, **change}, 0.0, 0, common, folder, teacher, unseen)
            for name, change in ROWS.items()
        ]
        updates = 320 if not chosen.quick else 4
        rates = LEARNING_RATES if not chosen.quick else LEARNING_RATES[:1]
        trained = [
            _row(name, {**PAPER, **change}, rate, updates, common, folder, teacher, unseen)
            for rate in rates
            for name, change in ROWS.items()
        ]
        intervals = [i.name for i in base.load_plan().intervals]
    return {
        "teacher": teachers.describe(model, teacher.weights),
        "intervals": intervals,
        "untrained": untrained,
        "trained": trained,
        "updates": updates,
    }


def _row(
    name: str, change: dict, rate: float, updates: int, common: dict, folder: Path, teacher, unseen
) -> dict:
    """One training of all intervals; 0 updates leaves the start as it is (a rate of 0 and one
    update)."""
    run = Run(folder / f"{name.replace(' ', '_').replace('/', '')}_{rate}")
    run.folder.mkdir(parents=True)
    for file in ("calibration.safetensors", "plan.json"):
        (run.folder / file).symlink_to(folder / "base" / file)
    rounds = max(1, updates // 40)
    settings = {
        **common,
        "run": run.folder,
        "learning_rate": rate,
        "rounds": rounds,
        "updates": max(1, updates // rounds),
    }
    distill_depth(
        DistillDepthConfig(
            **settings,
            **change,
            warm_up=16 if updates else 0,
            weight_decay=0.02 if updates else 0.0,
        )
    )
    plan = open_plan(DistillDepthConfig(**settings), teacher.weights)
    with torch.no_grad():
        damage = Damage(
            teacher, RunStudents(run, teacher.config, teacher.architecture), plan, unseen
        )
        joint = _with_interval(*damage.per_sample(layout_of(plan, plan.everything())))
        singles = sum(
            damage.of(Variant(name=interval.name, intervals=(interval.name,)))
            for interval in plan.intervals
        )
    print(f"\n{name}, rate {rate:g}: joint {joint['joint']:.4f}, singles {singles:.4f}", flush=True)
    return {"name": name, "learning_rate": rate, "updates": updates, **joint, "singles": singles}


def _with_interval(error: torch.Tensor, power: torch.Tensor) -> dict:
    estimate = ratio_estimate(error, power, seed=0)
    return {"joint": estimate.pop("value"), **estimate}


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("choices", __doc__)
    parser.add_argument("--teacher", type=Path, default=teachers.BUNDLED)
    chosen = output.parse(parser, arguments)
    values = measure(chosen)
    for title, rows in (
        ("No training", values["untrained"]),
        (f"{values['updates']} updates an interval", values["trained"]),
    ):
        lines = [
            (
                r["name"],
                f"{r['learning_rate']:g}",
                f"{r['joint']:.4f} ({r['low']:.4f}-{r['high']:.4f})",
                f"{r['singles']:.4f}",
            )
            for r in rows
        ]
        output.print_table(title, ("setting", "rate", "joint damage", "singles"), lines)
    return output.write("choices", chosen, values)


if __name__ == "__main__":
    main()
