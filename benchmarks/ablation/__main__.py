"""PPCL against every baseline, on the bundled teacher: the paper's ladder, equal parameters, three
sizes of one training.

Every row has the same calibration data and the same budget of block passes, half of it for the same
learning-rate search. Scores are on captions and samples that nothing was trained on, with 95 %
bootstrap intervals. Rows that are done are read from `runs/ablation`, so an interrupted run goes
on. `--seeds 3 --processes 4` trains every row three times, four at once: drops are then means over
seeds, and each row has its paired difference from ours.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ppcl_engine.data.calibration import save_calibration
from ppcl_engine.data.rendered.tables import fit_codec
from ppcl_engine.demo.bundled import TEACHERS, bundled
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import DetectConfig, ProbeConfig
from ppcl_engine.stages.prune.detect import detect
from ppcl_engine.stages.prune.probe import probe
from ppcl_engine.system.atomic import read_json, replacing, write_json

from ..shared import output
from ..shared.scoring import SEED, Judge
from ..shared.teachers import NARROW, describe, random_teacher, rendered
from . import chart
from .half import half_row, trained_longer
from .processes import train_rows
from .rows import Build, Context, trained
from .seeds import REFERENCE, combined, read_readings, resampled_drops
from .sizes import one_training, subsets
from .tables import SIZES, TABLES, TUNED, Row, half, ours, rows

BUDGET = 16_000  # block passes of a row
# of the longer training, and enough for a narrow interval
HALF_BUDGET, HALF_CAPTIONS = 80_000, 2_000
CAPTIONS, SAMPLES, BATCH, QUICK_BATCH = 300, 480, 48, 8
TINY = {**NARROW, "num_layers": 6}  # the teacher of a quick run


def measure(context: Context, judge: Judge, row: Row, build: Build, folder: Path) -> dict:
    """Trains and scores one row, or reads what an earlier run left."""
    path = folder / row.folder / "row.json"
    start = time.monotonic()
    model, search = trained(context, build, folder / row.folder, judge.validation_error)
    score = judge.score(model, row.name, folder / row.readings)
    values = {"name": row.name, "table": row.table, **score, **search}
    values |= subsets(context, judge, row.name, model, folder / row.folder / "run")
    values["seconds"] = time.monotonic() - start
    write_json(path, values)
    return values


def is_done(row: Row, folder: Path, seeds: int) -> bool:
    """One seed alone does without what was read of each picture, which earlier runs did not keep."""
    there = (folder / row.folder / "row.json").exists()
    return there and (seeds == 1 or (folder / row.readings).exists())


def seed_folder(work: Path, seed: int) -> Path:
    return work / f"seed_{seed}" if seed else work


def prepare(chosen, folder: Path, seed: int) -> tuple[Context, Judge]:
    """The calibration, the samples of searches and scores, and the captions are the seed's own."""
    weights = Weights(chosen.teacher)
    teacher = Teacher(weights, torch.float32, "cpu", streamed=False)
    batch = BATCH if not chosen.quick else QUICK_BATCH
    samples = SAMPLES if not chosen.quick else 2 * batch
    calibration = rendered(chosen.teacher, weights, samples, batch, seed=3 * seed)
    base = Run(folder / "base")
    if not base.calibration.exists():
        save_calibration(base.calibration, calibration)
    settings = {
        "longest": 8 if not chosen.quick else 3,
        "bootstrap": 0,
        "samples": 128 if not chosen.quick else samples,
    }
    write_json(base.folder / "detect_settings.json", settings)
    common = {"model": chosen.teacher, "run": base.folder, "device": "cpu", "seed": seed}
    probe(ProbeConfig(**common))
    detect(DetectConfig(**common, **settings))
    budget = chosen.budget or (BUDGET if not chosen.quick else 300)
    context = Context(
        model=chosen.teacher,
        teacher=teacher,
        calibration=calibration,
        base=base.folder,
        budget=budget,
        seed=seed,
    )
    unseen = rendered(
        chosen.teacher, weights, 240 if not chosen.quick else batch, batch, seed=3 * seed + 1
    )
    captions = chosen.captions or (CAPTIONS if not chosen.quick else 4)
    validation = rendered(chosen.teacher, weights, 2 * batch, batch, seed=3 * seed + 2)
    given = (chosen.teacher, open_model(chosen.teacher), validation, unseen, captions, folder)
    judge = Judge(*given, seed=SEED + seed)
    return (replace(context, rates=(1e-3,)) if chosen.quick else context), judge


@dataclass(frozen=True)
class Trial:
    """Everything of one seed."""

    folder: Path
    context: Context
    judge: Judge
    builds: dict[Row, Build]


def prepared_trial(chosen, seed: int) -> Trial:
    folder = seed_folder(Path(chosen.work), seed)
    context, judge = prepare(chosen, folder, seed)
    # finds every row's intervals before anything is trained
    builds = {row: row.build(context) for row in rows() if is_chosen(row, chosen)}
    return Trial(folder, context, judge, builds)


def is_chosen(row: Row, chosen) -> bool:
    wanted = not chosen.only or row.folder in chosen.only.split(",")
    return row.table in chosen.tables and wanted


def run(chosen) -> dict:
    seeds = range(chosen.seeds) if chosen.only_seed is None else [chosen.only_seed]
    trials = [prepared_trial(chosen, seed) for seed in seeds]
    if chosen.processes > 1:
        left = [
            (seed, row.folder)
            for seed, trial in zip(seeds, trials, strict=True)
            for row in trial.builds
            if not is_done(row, trial.folder, chosen.seeds)
        ]
        train_rows(left, row_arguments(chosen), Path(chosen.work), chosen.processes)
    found = [_rows_of(trial, chosen) for trial in trials]
    first = trials[0]
    tables = {
        name: [row for row in _over_seeds(trials, found) if row["table"] == name]
        for name in TABLES
        if name in chosen.tables
    }
    about = {
        "budget": first.context.budget,
        "rates": first.context.rates,
        "seeds": len(trials),
        "teacher": describe(chosen.teacher, first.context.teacher.weights),
    }
    half = _half(chosen, first.context, first.judge, first.folder)
    return {**tables, "ours_at_half": half, **about}


def row_arguments(chosen) -> list[str]:
    """The options of a process that trains one row."""
    given = {
        "--teacher": chosen.teacher,
        "--work": chosen.work,
        "--budget": chosen.budget,
        "--captions": chosen.captions,
        "--seeds": chosen.seeds,
    }
    words = [str(word) for pair in given.items() if pair[1] for word in pair]
    return [*(["--quick"] if chosen.quick else []), *words, "--tables", *chosen.tables]


def _rows_of(trial: Trial, chosen) -> list[tuple[dict, Path]]:
    """Every row of a seed, and the file with what was read of its pictures."""
    done = []
    for row, build in trial.builds.items():
        path = trial.folder / row.folder / "row.json"
        if is_done(row, trial.folder, chosen.seeds):
            values = read_json(path)
        else:
            values = measure(trial.context, trial.judge, row, build, trial.folder)
        done.append((values, trial.folder / row.readings))
        print(
            f"\n{row.table} {row.name}: drop {values['drop_percent']:.2f} % ({values['low']:.2f}-{values['high']:.2f}), "
            f"velocity error {values['velocity_error']['value']:.4f}, {values['parameters'] / 1e6:.2f} M",
            flush=True,
        )
    if "sizes" in chosen.tables:
        done += one_training(trial.context, trial.judge, trial.folder, SIZES)
    return done


def _over_seeds(trials: list[Trial], found: list[list[tuple[dict, Path]]]) -> list[dict]:
    """The rows of one seed as they are; of several, their means and differences from ours."""
    if len(trials) == 1:
        return [values for values, _ in found[0]]
    table = []
    for same in zip(*found, strict=True):
        pairs = zip(same, trials, strict=True)
        readings = [read_readings(path, trial.judge.kept) for (_, path), trial in pairs]
        table.append(([values for values, _ in same], resampled_drops(readings)))
    ours = next((drops for values, drops in table if values[0]["name"] == REFERENCE), None)
    return [combined(values, drops, None if drops is ours else ours) for values, drops in table]


def _half(chosen, context: Context, judge: Judge, folder: Path) -> dict | None:
    """The longer training at half of the parameters, and its score on many captions."""
    if "half" not in chosen.tables or chosen.only and "half" not in chosen.only.split(","):
        return None
    recipe = ours(context, half(context), TUNED)
    search = folder / "equal_parameters-ours_parts_only" / "search.json"
    budget = HALF_BUDGET if not chosen.quick else 2 * context.budget
    trained_longer(context, recipe, folder / "half", search, budget)
    captions = HALF_CAPTIONS if not chosen.quick else len(judge.texts)
    many = Judge(
        chosen.teacher, open_model(chosen.teacher), judge.validation, judge.unseen, captions, folder
    )
    values = half_row(context, judge, many, recipe, folder / "half")
    print(
        f"\nours at half: drop {values['drop_percent']:.2f} % ({values['low']:.2f}-{values['high']:.2f})",
        flush=True,
    )
    return values


def _tiny(path: Path) -> Path:
    if not path.exists():
        random_teacher(path, TINY, seed=0, codec=fit_codec(0, samples=16))
    return path


def show(values: dict) -> None:
    for table in [name for name in TABLES if name in values]:
        lines = [
            [
                r["name"],
                f"{r['parameters'] / 1e6:.2f}",
                f"{r['drop_percent']:.2f} ({r['low']:.2f}-{r['high']:.2f})",
                f"{100 * r['character_accuracy']:.1f}",
                f"{r['image_distance']:.3f}",
                f"{r['velocity_error']['value']:.4f}",
                f"{r['mean_of_subsets']:.4f}" if r.get("mean_of_subsets") else "-",
                f"{r.get('learning_rate', 0):g}",
                against(r.get("difference")),
            ]
            for r in values[table]
        ]
        header = [
            "row",
            "M",
            "drop %",
            "characters %",
            "image distance",
            "velocity error",
            "mean of subsets",
            "rate",
            f"against {REFERENCE}",
        ]
        output.print_table(table.replace("_", " "), header, lines)


def against(difference: dict | None) -> str:
    if difference is None:
        return "-"
    low, value, high = (f"{difference[name]:+.2f}" for name in ("low", "value", "high"))
    return f"{value} ({low} to {high}), {difference['verdict']}"


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("ablation", __doc__)
    parser.add_argument(
        "--teacher", help="qwen, flux: the bundled ones; a file; a tiny random one for --quick"
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder of the trainings (runs/ablation); a second run goes on there",
    )
    parser.add_argument("--budget", type=int, help=f"block passes of a row ({BUDGET})")
    parser.add_argument("--captions", type=int, help=f"pictures a row ({CAPTIONS})")
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=(*TABLES, "half"),
        default=(*TABLES, "half"),
        help="which (all)",
    )
    parser.add_argument(
        "--only",
        help="folders of the rows to train now, comma-separated; no result file is written",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="seeds of every row (1): the teacher stays, calibration, training and drawing vary",
    )
    parser.add_argument("--only-seed", type=int, help="with --only: the seed to train now")
    parser.add_argument(
        "--processes", type=int, default=1, help="rows that are trained side by side (1)"
    )
    chosen = output.parse(parser, arguments)
    suffix = f"_{chosen.teacher}" if chosen.teacher in TEACHERS and chosen.teacher != "qwen" else ""
    chosen.work = chosen.work or Path(
        ("runs/ablation_quick" if chosen.quick else "runs/ablation") + suffix
    )
    name = chosen.teacher or ("" if chosen.quick else "qwen")
    if name in TEACHERS:
        chosen.teacher = bundled(name)
    else:
        chosen.teacher = Path(name) if name else _tiny(chosen.work / "teacher.safetensors")
    values = run(chosen)
    if chosen.only:
        return chosen.work
    show(values)
    titled = {name.replace("_", " "): values[name] for name in TABLES if name in values}
    with replacing(chosen.output / f"ablation{suffix}.png") as temporary:
        temporary.write_bytes(chart.ablation_chart(titled))
    return output.write(f"ablation{suffix}", chosen, values)


if __name__ == "__main__":
    main()
