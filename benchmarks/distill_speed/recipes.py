"""The recipes that the race compares: the authors' plain loop with and without their chained second
pass, and the stage of this engine."""

from __future__ import annotations

import copy
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
from ppcl_engine.data.calibration import CalibrationSet, load_calibration
from ppcl_engine.models.streaming import Teacher, mixed_precision
from ppcl_engine.models.surgery import interval_streams
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import Interval, PruningPlan
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import DistillDepthConfig
from ppcl_engine.stages.prune import distill_depth
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.atomic import write_text
from ppcl_engine.system.machine import DTYPES
from ppcl_engine.system.seeds import draw_seed

LOSS = "direction"
WARM_UP, WEIGHT_DECAY = 16, 0.02


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all recipes are given."""

    model: Path
    calibration: Path
    intervals: tuple[Interval, ...]
    steps: int
    """of the plain recipe"""
    updates: int
    """of one PPCL round, and the grain of all horizons"""
    folder: Path
    device: str = "cpu"
    dtype: str = "float32"
    """of the teacher's blocks; students are float32"""
    streamed: bool = False
    """of PPCL's stage: whether the teacher's blocks are read one after the other"""


@dataclass
class Clock:
    """Wall time without the pauses."""

    device: str
    seconds: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
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
    clock, curve = Clock(task.device), []
    teacher, calibration = open_both(task)
    students = nn.ModuleDict(
        {i.name: copy.deepcopy(teacher.block(i.first)).float() for i in task.intervals}
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
            with mixed_precision(teacher):
                outputs = [run(student, source) for source in sources]
            replaced = set(interval.blocks)
        with torch.no_grad():
            before, state = state, run_block(block, state)
            if authors and index not in replaced and index < max(ends):
                chain = state if chain is before else run_block(block, chain)
        if index in ends:
            streams = interval_streams(teacher.architecture, teacher.config, ends[index])
            losses += [interval_loss(LOSS, output, state, streams) for output in outputs]
            image, text = (
                stream.detach().to(state.image) for stream in (outputs[-1].image, outputs[-1].text)
            )
            chain = outputs[-1].with_streams(image, text)
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
            device=task.device,
            dtype=task.dtype,
            streamed=task.streamed,
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
        clock, curve, work = Clock(task.device), [], Rounds.train_round

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
    dtype = DTYPES[task.dtype]
    return (
        Teacher(Weights(task.model), dtype, task.device, streamed=False),
        load_calibration(task.calibration),
    )
