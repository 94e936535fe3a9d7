"""Seconds until the held-out loss that the plain recipe reaches after 300 steps.

plain: as the authors' script works. Every step runs the whole teacher without gradients, calls the
students on its states and, chained, a second time; one optimiser, checkpointing. plain_light:
without checkpoints and second pass.
ours: the stage distill-depth, several updates from one sweep of the teacher, files and all.
Same teacher, samples, initialisation (copy of the first block), loss (direction), batch, optimiser
and schedule family; each recipe's own best learning rate. Time spent evaluating does not count.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from ppcl_engine.data.calibration import save_calibration
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import parse_intervals

from ..shared.output import options, parse, print_table, write
from ..shared.teachers import BUNDLED, describe, rendered
from .recipes import LOSS, HeldOut, Recipe, Task, Trained, ours, plain

INTERVALS = "2-4 6-8 10-12 14-16 18-20"
LONGEST = 3  # times the plain recipe's steps: then a recipe has failed
TUNING_SEED = 1000


def tuned(recipe: Recipe, rates: list[float], horizon: int) -> float:
    """The learning rate with the lowest held-out loss at half the length, on a seed of its own."""
    if len(rates) == 1:
        return rates[0]
    losses = {rate: recipe(horizon, rate, TUNING_SEED).loss for rate in rates}
    print("   ".join(f"rate {rate:g}: {loss:.5f}" for rate, loss in losses.items()), flush=True)
    return min(losses, key=losses.get)


def shortest(
    recipe: Recipe, rate: float, seed: int, target: float, start: int, grain: int, longest: int
) -> list[Trained]:
    """Trainings of growing or shrinking length around the shortest whose end is at or below
    `target`.

    Each has its own full schedule, so the shortest one that reaches the target is what a user would
    run.
    """
    tried = [recipe(start, rate, seed)]
    direction = -grain if tried[0].loss <= target else grain
    while grain <= tried[-1].horizon + direction <= longest:
        tried.append(recipe(tried[-1].horizon + direction, rate, seed))
        if (tried[-1].loss <= target) != (direction < 0):
            break
    return tried


def race(
    task: Task, recipes: dict[str, Recipe], rates: dict[str, float], repeats: int
) -> list[dict]:
    """One row a repeat, recipes in turn: plain sets the target, the others look for their shortest
    way to it."""
    rows, starts = [], {name: near(task.steps, task.updates) for name in recipes}
    for repeat in range(repeats):
        first = recipes["plain"](task.steps, rates["plain"], repeat)
        row = {"target": first.loss, "plain": first, "trials": {"plain": [first]}}
        for name in ("plain_light", "ours"):
            recipe, longest = recipes[name], LONGEST * task.steps
            tried = shortest(
                recipe, rates[name], repeat, first.loss, starts[name], task.updates, longest
            )
            reached = [trained for trained in tried if trained.loss <= first.loss]
            row[name] = min(reached, key=lambda trained: trained.horizon) if reached else None
            row["trials"][name] = tried
            starts[name] = row[name].horizon if reached else starts[name]
        rows.append(row)
        parts = [
            f"{n} {row[n].seconds:.1f} s ({row[n].horizon})" if row[n] else f"{n} never"
            for n in recipes
        ]
        print(f"repeat {repeat}: target {first.loss:.5f}   " + "   ".join(parts), flush=True)
    return rows


def near(steps: int, grain: int) -> int:
    return max(1, round(steps / grain)) * grain


def median_of(rows: list[dict], name: str, field: str) -> float | None:
    """None where a repeat never reached the target."""
    values = [getattr(row[name], field) for row in rows if row[name]]
    return statistics.median(values) if len(values) == len(rows) else None


def summary(rows: list[dict], rates: dict[str, float]) -> dict:
    seconds = {name: median_of(rows, name, "seconds") for name in rates}
    trials = {name: [trained for row in rows for trained in row["trials"][name]] for name in rates}
    ratios = [row["plain"].seconds / row["ours"].seconds for row in rows if row["ours"]]
    return {
        **seconds,
        "ratio": seconds["ours"] and seconds["plain"] / seconds["ours"],
        "ratio_light": seconds["ours"]
        and seconds["plain_light"]
        and seconds["plain_light"] / seconds["ours"],
        "ratio_range": [min(ratios), max(ratios)] if ratios else None,
        "updates": {name: median_of(rows, name, "horizon") for name in rates},
        "seconds_per_update": {
            n: statistics.median(t.seconds / t.horizon for t in trials[n]) for n in rates
        },
        "target": [row["target"] for row in rows],
        "learning_rates": rates,
        "curves": {name: [trained.curve for trained in trials[name]] for name in rates},
    }


def show(values: dict) -> None:
    rows = []
    for name in values["learning_rates"]:
        seconds, updates = values[name], values["updates"][name]
        cost = f"{1e3 * values['seconds_per_update'][name]:.0f} ms"
        times = f"{seconds / values['ours']:.2f} x" if seconds and values["ours"] else "-"
        found = ["never", "-"] if seconds is None else [f"{seconds:.1f} s", f"{updates:g}"]
        rows.append([name, *found, cost, f"{values['learning_rates'][name]:g}", times])
    header = ["recipe", "seconds", "updates", "an update", "rate", "to ours"]
    print_table("to the same held-out loss (medians)", header, rows)


def build_task(chosen, folder: Path) -> tuple[Task, HeldOut, dict]:
    weights = Weights(chosen.teacher)
    held_out_batches = 2 if chosen.quick else 8
    samples = chosen.samples + held_out_batches * chosen.batch
    calibration = rendered(chosen.teacher, weights, samples, chosen.batch, seed=0)
    training, held_out = calibration.split(held_out_batches)
    save_calibration(folder / "calibration.safetensors", training)
    task = Task(
        model=chosen.teacher,
        calibration=folder / "calibration.safetensors",
        intervals=parse_intervals(chosen.intervals),
        steps=chosen.steps,
        updates=chosen.updates,
        folder=folder,
    )
    teacher = Teacher(weights, torch.float32, "cpu", streamed=False)
    return task, HeldOut(teacher, held_out, task.intervals), describe(chosen.teacher, weights)


def settings_of(chosen) -> dict:
    names = ("intervals", "batch", "samples", "steps", "updates", "repeats")
    return {
        **{name: getattr(chosen, name) for name in names},
        "loss": LOSS,
        "tuned_over": chosen.learning_rates,
    }


def main(arguments: list[str] | None = None) -> Path:
    parser = options("distill_speed", __doc__)
    parser.add_argument("--teacher", type=Path, default=BUNDLED)
    parser.add_argument("--intervals", default=INTERVALS)
    parser.add_argument(
        "--steps", type=int, help="steps of the plain recipe that set the target (300)"
    )
    parser.add_argument(
        "--updates", type=int, help="updates of one PPCL round, and the grain of the search (40)"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--samples", type=int, help="training pictures, with fresh noise every step (1024)"
    )
    parser.add_argument("--repeats", type=int, help="seeds, all recipes in turn (3)")
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        help="each recipe takes its best (5e-4 1e-3 2e-3)",
    )
    chosen = parse(parser, arguments)
    full = {
        "steps": 300,
        "updates": 40,
        "samples": 1024,
        "repeats": 3,
        "learning_rates": [5e-4, 1e-3, 2e-3],
    }
    quick = {"steps": 6, "updates": 4, "samples": 32, "repeats": 1, "learning_rates": [1e-3]}
    for name, value in (quick if chosen.quick else full).items():
        setattr(chosen, name, value if getattr(chosen, name) is None else getattr(chosen, name))
    with tempfile.TemporaryDirectory(prefix="ppcl_speed_") as name:
        task, held_out, teacher = build_task(chosen, Path(name))
        recipes: dict[str, Recipe] = {
            "plain": partial(plain, task, held_out, True),
            "plain_light": partial(plain, task, held_out, False),
            "ours": partial(ours, task, held_out),
        }
        horizon = near(chosen.steps // 2, chosen.updates)
        rates = {
            name: tuned(recipe, chosen.learning_rates, horizon) for name, recipe in recipes.items()
        }
        rows = race(task, recipes, rates, chosen.repeats)
    values = {**summary(rows, rates), "teacher": teacher, "settings": settings_of(chosen)}
    show(values)
    return write("distill_speed", chosen, values)


if __name__ == "__main__":
    main()
