"""Samples a second of distil-depth, streamed and resident, beside the plain recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import parse_intervals
from ppcl_engine.system.machine import DTYPES, PeakMemory

from ..distill_speed.recipes import Task, Trained, ours, plain
from .card import Card
from .runs import DTYPE, prepared
from .scale import Scale
from .table import Line

PLAIN = "plain recipe"
RATE = 1e-5


class NotJudged:
    """In the place of the held-out loss, which is not asked for here."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    def loss(self, student: Callable) -> float:
        return 0.0


def rows(card: Card, scale: Scale, folder: Path) -> dict[str, Callable[[], dict]]:
    def row(train: Callable[..., Trained], steps: int, streamed: bool = False) -> Callable:
        return partial(measure, card, scale, folder, train, steps, streamed)

    training = scale.training
    return {
        PLAIN: row(partial(plain, authors=True), training.steps),
        f"{PLAIN}, one pass, no checkpoints": row(partial(plain, authors=False), training.steps),
        "distil-depth, resident": row(ours, training.updates),
        "distil-depth, streamed": row(ours, training.updates, streamed=True),
    }


def measure(
    card: Card,
    scale: Scale,
    folder: Path,
    train: Callable[..., Trained],
    steps: int,
    streamed: bool,
) -> dict:
    """Seconds a step: an update of every student on one batch."""
    training = scale.training
    with tempfile.TemporaryDirectory(dir=folder) as name:
        task = task_of(card, scale, Path(name), streamed)
        judge = NotJudged(Teacher(Weights(task.model), DTYPES[DTYPE], card.device, streamed=True))
        course = {"task": task, "held_out": judge, "learning_rate": RATE, "seed": 0}
        plain(**course, authors=False, horizon=1)  # a first step, for what it loads
        memory = PeakMemory(card.device)
        seconds = train(**course, horizon=steps).seconds / steps
    return {
        "seconds": seconds,
        "samples_a_second": training.batch / seconds,
        "blocks": training.distilled[0],
        "intervals": training.distilled[1],
        "peak": memory.above_start(),
    }


def task_of(card: Card, scale: Scale, folder: Path, streamed: bool) -> Task:
    training = scale.training
    blocks, intervals = training.distilled
    made = prepared(folder, scale, blocks, intervals)
    return Task(
        model=made.model,
        calibration=made.run.calibration,
        intervals=parse_intervals(intervals),
        steps=training.steps,
        updates=training.updates,
        folder=folder,
        device=card.device,
        dtype=DTYPE,
        streamed=streamed,
    )


def lines(measured: dict[str, dict]) -> list[Line]:
    return [_line(name, row, measured[PLAIN]) for name, row in measured.items()]


def _line(name: str, row: dict, slowest: dict) -> Line:
    if "cut" in row:
        return Line.of(name, row)
    note = f"{row['samples_a_second']:.3g} samples a second; {row['blocks']} blocks, intervals {row['intervals']}"
    share = None if "cut" in slowest else row["seconds"] / slowest["seconds"]
    return Line.of(name, row, note, time_share=share)
