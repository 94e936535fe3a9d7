"""Training in bfloat16 at the default learning rate against float32: how many weights move, and how
good they are then.

Every stage that trains runs on the demo's teacher in float32, in bfloat16 (forward and backward in
bfloat16, the weights in training in float32), and in bfloat16 with these weights in bfloat16 too,
which is the wrong way, to compare with; polish and finetune also with moments in 8 bits and averages
in bfloat16 (`--optimizer-state compact`). `moved_share`: weights that differ from where they began.
`loss_ratio_to_float32`: error of the final velocity with the trained parts, relative to that of the
parts trained in float32, both judged in float32 on the calibration set; `noise`: relative standard
deviation of float32's own error over seeds. `training_loss_ratio`: of the losses while training,
last quarter; in bfloat16 they hold the rounding of both forwards.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from ppcl_engine.algorithms.distillation.losses import velocity_loss
from ppcl_engine.algorithms.distillation.trainer import Trainer
from ppcl_engine.algorithms.distillation.tuning import AveragedTrainer
from ppcl_engine.algorithms.distillation.walks import ResidentWalk
from ppcl_engine.data.calibration import load_calibration, save_calibration
from ppcl_engine.models.assembly import open_variant
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import FULL, PruningPlan, Variant, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import (
    DistillDepthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
)
from ppcl_engine.stages.prune.distill_depth import distill_depth
from ppcl_engine.stages.prune.distill_width import distill_width
from ppcl_engine.stages.prune.finetune import finetune
from ppcl_engine.stages.prune.polish import polish
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.atomic import write_text

from .shared import output
from .shared.teachers import BUNDLED, describe, rendered

INTERVALS, SITES = "3-4 9-11", "ffn_image:1 ffn_text:2 text:12-13"
QUICK_INTERVALS, QUICK_SITES = "1-2 3-4", "ffn_image:0 text:5"
STAGES = {
    "distill_depth": (distill_depth, DistillDepthConfig),
    "distill_width": (distill_width, DistillWidthConfig),
    "polish": (polish, PolishConfig),
    "finetune": (finetune, FinetuneConfig),
}
SINGLE, HALF = {"dtype": "float32"}, {"dtype": "bfloat16"}
COMPACT = {**HALF, "optimizer_state": "compact"}
TUNING = ("polish", "finetune")  # stages that know it
GOALS = {"moved_share_of_float32": 0.99, "loss_ratio_to_float32": 1.01}


@dataclass
class Watched:
    """What the trainers inside `watching` did: weights that moved, weights there are, losses of
    each trainer."""

    starts: dict[Trainer | AveragedTrainer, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def moved_share(self) -> float:
        pairs = [
            (a, b)
            for trainer, old in self.starts.items()
            for a, b in zip(old, weights_of(trainer), strict=True)
        ]
        return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)

    @property
    def losses(self) -> list[list[float]]:
        return [trainer.losses for trainer in self.starts]


def weights_of(trainer: Trainer | AveragedTrainer) -> list[torch.Tensor]:
    module = trainer.module if isinstance(trainer, Trainer) else trainer.walk.module
    return [p.detach() for p in module.parameters()]


@contextmanager
def watching(kept_in: torch.dtype = torch.float32) -> Iterator[Watched]:
    """kept_in: precision of the weights in training; only the wrong way changes it."""
    watched = Watched()
    with ExitStack() as patched:
        for kind in (Trainer, ResidentWalk):
            made = _made_in(kept_in, kind.__init__)
            patched.enter_context(patch.object(kind, "__init__", made))
        for kind in (Trainer, AveragedTrainer):
            patched.enter_context(patch.object(kind, "update", _watched(watched, kind.update)))
        yield watched


def _made_in(kept_in: torch.dtype, begin: Callable[..., None]) -> Callable[..., None]:
    def made(self, module: torch.nn.Module, *arguments) -> None:
        begin(self, module if kept_in is torch.float32 else module.to(kept_in), *arguments)

    return made


def _watched(watched: Watched, update: Callable[..., None]) -> Callable[..., None]:
    def updated(self: Trainer | AveragedTrainer, *arguments) -> None:
        watched.starts.setdefault(self, [p.clone() for p in weights_of(self)])
        update(self, *arguments)

    return updated


def last_quarter(losses: list[list[float]]) -> float:
    return statistics.fmean(
        value for history in losses for value in history[-max(1, len(history) // 4) :]
    )


@torch.no_grad()
def error_of(folder: Path, teacher: Path) -> float:
    """The error of the final velocity in float32, with everything that was trained switched on."""
    run, weights = Run(folder), Weights(teacher)
    plan, architecture = run.load_plan(), weights.architecture
    tuned = [variant for variant in plan.variants if variant.tuned]
    students = RunStudents(run, weights.config, architecture)
    model = open_variant(
        weights, students, plan, (tuned or [plan.everything()])[0], torch.float32, "cpu"
    )
    full = open_variant(weights, students, plan, plan.variant(FULL), torch.float32, "cpu")
    rows = load_calibration(run.calibration).all_inputs()
    ours, theirs = (torch.cat([architecture.call(m, row) for row in rows]) for m in (model, full))
    return float(velocity_loss(ours, theirs))


def run_once(
    stage: str, start: Path, folder: Path, settings: dict, kept_in: torch.dtype = torch.float32
) -> dict:
    """One training from a copy of the run folder `start`: {"moved_share", "error",
    "training_loss"}. One round: no trainer is made twice."""
    shutil.copytree(start, folder)
    work, kind = STAGES[stage]
    with watching(kept_in) as watched:
        work(kind(run=folder, **settings))
    found = {
        "moved_share": watched.moved_share,
        "error": error_of(folder, settings["model"]),
        "training_loss": last_quarter(watched.losses),
    }
    shutil.rmtree(folder)
    return found


def prepare(folder: Path, teacher: Path, intervals: str, samples: int) -> Path:
    """A run folder with calibration and plan."""
    weights, run = Weights(teacher), Run(folder)
    save_calibration(run.calibration, rendered(teacher, weights, samples, 8, seed=0))
    plan = PruningPlan(
        architecture=weights.architecture.name,
        config=weights.config,
        num_blocks=weights.num_blocks,
        fingerprint=weights.fingerprint,
        intervals=parse_intervals(intervals),
    )
    write_text(run.plan, plan.to_json())
    return folder


def settings_of(stage: str, teacher: Path, sites: str, updates: int, steps: int) -> dict:
    """Everything but the number of updates and steps and the sites is the default."""
    common = {"model": teacher, "device": "cpu"}
    if stage == "distill_depth":
        return {**common, "rounds": 1, "updates": updates}
    if stage == "distill_width":
        return {**common, "rounds": 1, "updates": updates, "sites": sites}
    return {**common, "steps": steps, **({"variant": "all"} if stage == "finetune" else {})}


def measure(stage: str, work: Path, settings: dict, seeds: int) -> dict:
    def trained(seed: int, kind: dict, kept_in: torch.dtype = torch.float32) -> dict:
        found = run_once(
            stage, work / "start", work / "copy", {**settings, **kind, "seed": seed}, kept_in
        )
        print(f"{stage} seed {seed} {kind['dtype']}, weights in {kept_in}: {found}", flush=True)
        return found

    single = [trained(seed, SINGLE) for seed in range(seeds)]
    half = [trained(seed, HALF) for seed in range(seeds)]
    wrong = trained(0, HALF, torch.bfloat16)
    compact = [trained(seed, COMPACT) for seed in range(seeds) if stage in TUNING]
    mean = {
        name: [statistics.fmean(row[name] for row in rows) for rows in (single, half)]
        for name in wrong
    }
    spread = statistics.stdev(row["error"] for row in single) if seeds > 1 else 0.0
    return {
        "moved_share": mean["moved_share"][1],
        "loss_ratio_to_float32": mean["error"][1] / mean["error"][0],
        "noise": spread / mean["error"][0],
        "training_loss_ratio": mean["training_loss"][1] / mean["training_loss"][0],
        "float32": {name: values[0] for name, values in mean.items()},
        "weights_in_bfloat16": {
            "moved_share": wrong["moved_share"],
            "loss_ratio_to_float32": wrong["error"] / single[0]["error"],
        },
        **({"compact": compared(compact, single)} if compact else {}),
    }


def compared(rows: list[dict], single: list[dict]) -> dict:
    """Rows of the same seeds, in the mean, against those in float32."""
    errors = [statistics.fmean(row["error"] for row in found) for found in (rows, single)]
    return {
        "moved_share": statistics.fmean(row["moved_share"] for row in rows),
        "loss_ratio_to_float32": errors[0] / errors[1],
    }


def run(chosen: Namespace, folder: Path) -> dict:
    intervals, sites = (QUICK_INTERVALS, QUICK_SITES) if chosen.quick else (INTERVALS, SITES)
    updates, steps, samples, seeds = (4, 4, 16, 1) if chosen.quick else (160, 64, 128, 2)
    settings = partial(
        settings_of, teacher=chosen.teacher, sites=sites, updates=updates, steps=steps
    )
    prepare(folder / "start", chosen.teacher, intervals, samples)
    values = {"distill_depth": measure("distill_depth", folder, settings("distill_depth"), seeds)}
    _train(folder / "start", "distill_depth", settings("distill_depth"))
    values["distill_width"] = measure("distill_width", folder, settings("distill_width"), seeds)
    _train(folder / "start", "distill_width", settings("distill_width"))
    _name_everything(Run(folder / "start"))
    for stage in TUNING:
        values[stage] = measure(stage, folder, settings(stage), seeds)
    met = all(
        row["moved_share"] >= GOALS["moved_share_of_float32"] * row["float32"]["moved_share"]
        and row["loss_ratio_to_float32"] <= GOALS["loss_ratio_to_float32"]
        for row in values.values()
    )
    about = {
        "updates": updates,
        "steps": steps,
        "samples": samples,
        "seeds": seeds,
        "intervals": intervals,
        "sites": sites,
    }
    return {
        **values,
        "goals": GOALS,
        "goals_met": met,
        **about,
        "teacher": describe(chosen.teacher, Weights(chosen.teacher)),
    }


def _train(folder: Path, stage: str, settings: dict) -> None:
    """For the stages behind it."""
    work, kind = STAGES[stage]
    work(kind(run=folder, **settings))


def _name_everything(run: Run) -> None:
    plan = run.load_plan()
    everything = plan.everything()
    variant = Variant(name="all", intervals=everything.intervals, sites=everything.sites)
    write_text(run.plan, plan.with_parts(variants=(variant,)).to_json())


def show(values: dict) -> None:
    rows = []
    for stage in STAGES:
        row, wrong = values[stage], values[stage]["weights_in_bfloat16"]
        shares = (row["float32"]["moved_share"], row["moved_share"], wrong["moved_share"])
        ratios = (row["loss_ratio_to_float32"], row["noise"], wrong["loss_ratio_to_float32"])
        rows.append(
            [
                stage,
                *(f"{100 * share:.2f} %" for share in shares),
                *(f"{ratio:.4f}" for ratio in ratios),
                f"{row['compact']['loss_ratio_to_float32']:.4f}" if "compact" in row else "",
            ]
        )
    header = [
        "stage",
        "moved fp32",
        "moved bf16",
        "moved, weights in bf16",
        "loss ratio",
        "noise",
        "ratio, weights in bf16",
        "ratio, compact state",
    ]
    output.print_table("training in bfloat16 at the default rate", header, rows)


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("precision", __doc__)
    parser.add_argument(
        "--teacher",
        type=Path,
        default=BUNDLED,
        help="a small teacher with its codec (default: the demo's)",
    )
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    chosen = output.parse(parser, arguments)
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="ppcl_precision_") as name:
        values = run(chosen, Path(name))
    show(values)
    return output.write("precision", chosen, values)


if __name__ == "__main__":
    main()
