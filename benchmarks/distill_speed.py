"""Seconds until the held-out loss that the plain recipe reaches after 300 steps.

plain: as the authors' script works. Every step runs the whole teacher without gradients, calls the
students on its states and, chained, a second time; one optimiser, checkpointing. plain_light:
without checkpoints and second pass.
ours: the stage distill-depth, several updates from one sweep of the teacher, files and all.
Same teacher, samples, initialisation (copy of the first block), loss (direction), batch, optimiser
and schedule family; each recipe's own best learning rate. Time spent evaluating does not count.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppcl_engine.algorithms.distillation.losses import interval_loss
from ppcl_engine.algorithms.distillation.rounds import Rounds
from ppcl_engine.algorithms.distillation.trainer import Trainer, cosine_schedule
from ppcl_engine.architectures import BlockState, Inputs
from ppcl_engine.data.calibration import CalibrationSet, load_calibration, save_calibration
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.surgery import interval_streams
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import Interval, PruningPlan, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import DistillDepthConfig
from ppcl_engine.stages.inputs import RunStudents
from ppcl_engine.stages.prune import distill_depth
from ppcl_engine.system.atomic import write_text
from ppcl_engine.system.seeds import draw_seed

from .shared.output import options, parse, print_table, write
from .shared.teachers import BUNDLED, describe, rendered

INTERVALS = "2-4 6-8 10-12 14-16 18-20"
LOSS = "direction"
WARM_UP, WEIGHT_DECAY = 16, 0.02
LONGEST = 3  # times the plain recipe's steps: then a recipe has failed
TUNING_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all recipes are given. `updates`: of one PPCL round, and the grain of all
    horizons."""

    model: Path
    calibration: Path
    intervals: tuple[Interval, ...]
    steps: int
    updates: int
    folder: Path


@dataclass
class Clock:
    """Wall time without the pauses."""

    seconds: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One training to its end. `curve`: (updates of a student, seconds, held-out loss)."""

    horizon: int
    learning_rate: float
    curve: list[tuple[int, float, float]]

    @property
    def seconds(self) -> float:
        return self.curve[-1][1]

    @property
    def loss(self) -> float:
        return self.curve[-1][2]


class HeldOut:
    """Sum over intervals and streams of the loss on teacher states that no recipe trains on."""

    def __init__(
        self, teacher: Teacher, calibration: CalibrationSet, intervals: tuple[Interval, ...]
    ):
        self.teacher, self.intervals = teacher, intervals
        with torch.no_grad():
            self.states = [self._boundaries(inputs) for inputs in calibration.all_inputs()]

    def _boundaries(self, inputs: Inputs) -> list[BlockState]:
        states = [self.teacher.embed(inputs)]
        for _, block in self.teacher.walk(0, max(i.last for i in self.intervals)):
            states.append(self.teacher.architecture.run_block(block, states[-1]))
        return states

    def loss(self, student: Callable[[Interval], nn.Module]) -> float:
        with torch.no_grad():
            return sum(self._of(interval, student(interval)) for interval in self.intervals) / len(
                self.states
            )

    def _of(self, interval: Interval, student: nn.Module) -> float:
        architecture = self.teacher.architecture
        streams = interval_streams(architecture, self.teacher.config, interval)
        pairs = [(states[interval.first], states[interval.last + 1]) for states in self.states]
        outputs = [(architecture.run_block(student, source), target) for source, target in pairs]
        return sum(
            float(interval_loss(LOSS, output, target, streams)) for output, target in outputs
        )


Recipe = Callable[[int, float, int], Trained]
"""(horizon in updates, peak learning rate, seed) -> one training"""


def plain(
    task: Task, held_out: HeldOut, authors: bool, horizon: int, learning_rate: float, seed: int
) -> Trained:
    """`authors`: with checkpoints and the chained second pass."""
    clock, curve = Clock(), []
    teacher, calibration = open_both(task)
    students = nn.ModuleDict(
        {i.name: copy.deepcopy(teacher.block(i.first)) for i in task.intervals}
    ).train()
    trainer = Trainer(students, WEIGHT_DECAY)
    for step in range(horizon):
        inputs = calibration.fresh(step % len(calibration), draw_seed(seed, step))
        loss = plain_loss(teacher, students, task.intervals, inputs, authors)
        trainer.update(loss, cosine_schedule(step, horizon, learning_rate, WARM_UP), "plain")
        if trainer.step % task.updates == 0 or trainer.step == horizon:
            with clock.paused():
                curve.append(
                    (trainer.step, clock.seconds, held_out.loss(lambda i: students[i.name]))
                )
    return Trained(horizon=horizon, learning_rate=learning_rate, curve=curve)


def plain_loss(
    teacher: Teacher, students: nn.ModuleDict, intervals, inputs: Inputs, authors: bool
) -> torch.Tensor:
    """The whole teacher's forward with the students inside; `chain` is the same state after the
    students so far.

    The chain goes through the teacher's blocks between intervals without gradients, which is the
    cheaper reading of the authors' script.
    """
    run_block = teacher.architecture.run_block
    starts, ends = {i.first: i for i in intervals}, {i.last: i for i in intervals}
    with torch.no_grad():
        state = chain = teacher.embed(inputs)
    losses, outputs, replaced = [], [], set()
    for index, block in teacher.walk(0, teacher.num_blocks - 1):
        if index in starts:
            interval, student = starts[index], students[starts[index].name]
            sources = [state, chain] if authors else [state]
            run = partial(checkpoint, run_block, use_reentrant=False) if authors else run_block
            outputs = [run(student, source) for source in sources]
            replaced = set(interval.blocks)
        with torch.no_grad():
            before, state = state, run_block(block, state)
            if authors and index not in replaced and index < max(ends):
                chain = state if chain is before else run_block(block, chain)
        if index in ends:
            streams = interval_streams(teacher.architecture, teacher.config, ends[index])
            losses += [interval_loss(LOSS, output, state, streams) for output in outputs]
            chain = outputs[-1].with_streams(outputs[-1].image.detach(), outputs[-1].text.detach())
    with torch.no_grad():
        teacher.architecture.finish(teacher.outer, state)
    return sum(losses)


def ours(task: Task, held_out: HeldOut, horizon: int, learning_rate: float, seed: int) -> Trained:
    """The stage itself from its files to its files; students are looked at between rounds, off the
    clock."""
    with tempfile.TemporaryDirectory(dir=task.folder) as name:
        run = prepared_run(Path(name), task, held_out.teacher)
        config = DistillDepthConfig(
            model=task.model,
            run=run.folder,
            device="cpu",
            seed=seed,
            init="first",
            correction="none",
            loss=LOSS,
            rounds=horizon // task.updates,
            updates=task.updates,
            learning_rate=learning_rate,
            warm_up=WARM_UP,
            weight_decay=WEIGHT_DECAY,
        )
        students = RunStudents(run, held_out.teacher.config, held_out.teacher.architecture)
        clock, curve, work = Clock(), [], Rounds.train_round

        def watched(rounds: Rounds, number: int, *more) -> None:
            work(rounds, number, *more)
            with clock.paused():
                loss = held_out.loss(
                    lambda interval: students.student(interval, torch.float32, "cpu")
                )
                curve.append(((number + 1) * task.updates, clock.seconds, loss))

        with mock.patch.object(Rounds, "train_round", watched):
            distill_depth.distill_depth(config)
        with clock.paused():
            # the plan is written after the last round
            curve[-1] = (curve[-1][0], clock.seconds, curve[-1][2])
    return Trained(horizon=horizon, learning_rate=learning_rate, curve=curve)


def prepared_run(folder: Path, task: Task, teacher: Teacher) -> Run:
    run = Run(folder)
    run.calibration.symlink_to(task.calibration.resolve())
    plan = PruningPlan(
        architecture=teacher.architecture.name,
        config=teacher.config,
        num_blocks=teacher.num_blocks,
        fingerprint=teacher.weights.fingerprint,
        intervals=task.intervals,
    )
    write_text(run.plan, plan.to_json())
    return run


def open_both(task: Task) -> tuple[Teacher, CalibrationSet]:
    return Teacher(Weights(task.model), torch.float32, "cpu", streamed=False), load_calibration(
        task.calibration
    )


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
