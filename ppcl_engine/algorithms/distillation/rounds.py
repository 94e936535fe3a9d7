"""Training in rounds. A round is one sweep of the teacher over fresh samples, which leaves the
states that students learn from; then each of them takes its updates from those.

A sweep costs as much as many students' updates, so every cached batch serves several of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from ...architectures import BlockState
from ...data.calibration import CalibrationSet
from ...models.streaming import StateStore, Teacher, room_for_states, state_bytes
from ...settings.prune_settings import DistillDepthConfig, DistillWidthConfig
from ...system.distributed import processes
from ...system.interruption import stop_on_interrupt
from ...system.progress import Progress
from ...system.seeds import draw_seed
from .kept_trainers import KeptTrainers, TrainedPart
from .loop import Session, train_until
from .round_cache import IN_MEMORY, RoundCache, RoundSettings, waiting
from .trainer import Trainer

Taught = TypeVar("Taught", contravariant=True)


class Course(Protocol[Taught]):
    """What a stage knows of the parts that it trains."""

    def path(self, part: Taught, /) -> Path:
        """The file of its training."""
        ...

    def settings(self, part: Taught, /) -> str:
        """Its `resume_settings`, as JSON."""
        ...

    def name(self, part: Taught, /) -> str:
        """Its name in losses and messages."""
        ...

    def boundaries(self, part: Taught, /) -> set[int]:
        """Which of the teacher's states it learns from (i: the input of block i)."""
        ...

    def begin(self, part: Taught, /, states: FreshStates) -> Trainer:
        """Its trainer, from its file if there is one, otherwise new."""
        ...

    def loss_at(
        self, part: Taught, /, trainer: Trainer, states: FreshStates
    ) -> Callable[[int], torch.Tensor]:
        """The loss before each of the round's updates, by step."""
        ...


@dataclass(kw_only=True)
class Rounds(Generic[TrainedPart]):
    """The training of a stage's parts, round by round."""

    name: str
    """of the stage, beside its bar"""
    course: Course[TrainedPart]
    parts: Sequence[TrainedPart]
    """those that this process trains"""
    teacher: Teacher
    calibration: CalibrationSet
    config: DistillDepthConfig | DistillWidthConfig
    cache: RoundCache

    def train(self) -> None:
        """Goes on from what is saved. Raises Stopped on Ctrl-C after saving, Diverged with the last
        good state kept."""
        config, course = self.config, self.course
        kept = KeptTrainers(course.path, course.settings, config.rounds)
        steps = config.rounds * config.updates
        done, total = sum(kept.step(part) or 0 for part in self.parts), steps * len(self.parts)
        if done < total:
            self.cache.tell_reuse(self.settings)
        progress = Progress(total=total, initial=done, desc=self.name, unit="update")
        with stop_on_interrupt() as asked, progress, kept.saved_when_stopped():
            session = Session(rates=config, steps=steps, progress=progress, stop_asked=asked)
            for number in range(config.rounds):
                due = unfinished(number, config.updates)
                parts = [part for part in self.parts if kept.step(part) in due]
                if parts:
                    self.train_round(number, parts, kept, session)

    @property
    def settings(self) -> RoundSettings:
        return self.cache.settings(self.config)

    def train_round(
        self,
        number: int,
        parts: list[TrainedPart],
        kept: KeptTrainers[TrainedPart],
        session: Session,
    ) -> None:
        """Sweeps the teacher once. Each part is trained as soon as the sweep has come to the last of
        its states, so that few boundaries wait at a time."""
        folder = self.cache.folder
        folder = folder and processes().folder(folder / f"{self.name}_{number}")
        states = FreshStates(self.teacher, self.calibration, self.settings, number, folder)
        ordered = sorted(parts, key=lambda part: max(self.course.boundaries(part)))
        read = [self.course.boundaries(part) for part in ordered]
        end = (number + 1) * self.config.updates
        for position, part in enumerate(ordered):
            states.reach(max(read[position]), waiting(read[position:]))
            trainer = kept.take(part, self.teacher.device) or self.course.begin(part, states)
            loss_at = self.course.loss_at(part, trainer, states)
            save = partial(kept.save, part, trainer)
            train_until(end, trainer, loss_at, self.course.name(part), session, save)
            kept.put(part, trainer)
        states.clear()
        kept.end_round(number)


class FreshStates:
    """The teacher's states at block boundaries (i: input of block i), batch by batch, as far as its
    sweep has come."""

    def __init__(
        self,
        teacher: Teacher,
        calibration: CalibrationSet,
        settings: RoundSettings,
        number: int,
        folder: Path | None,
    ):
        self.teacher, self.calibration = teacher, calibration
        self.settings, self.number = settings, number
        first = teacher.embed(self._inputs(0))
        self.batches = range(settings.batches_that_fit(first))
        self.embedded = [first] + [teacher.embed(self._inputs(batch)) for batch in self.batches[1:]]
        room, one = room_for_states(IN_MEMORY), sum(state_bytes(state) for state in self.embedded)
        self.passing = StateStore(folder and folder / "passing", room=room)
        """of the boundary that the sweep has come to"""
        self.kept = StateStore(folder, room=max(0, room - one))
        """of those that parts read further on"""
        self.reached, self.waiting = 0, set[int]()
        for batch, state in enumerate(self.embedded):
            self.passing.put(0, batch, state)

    def state(self, boundary: int, batch: int) -> BlockState:
        store = self.passing if boundary == self.reached else self.kept
        return store.get(boundary, batch, self.embedded[batch])

    @torch.no_grad()
    def reach(self, boundary: int, later: set[int]) -> None:
        """Sweeps on to this boundary. later: those that are read when the sweep has gone on; the others
        go."""
        for done in self.waiting - later:
            for batch in self.batches:
                self.kept.drop(done, batch)
        self.waiting &= later
        for index, block in self.teacher.walk(self.reached, boundary - 1):
            for batch in self.batches:
                state = self.passing.get(index, batch, self.embedded[batch])
                if index in later:
                    self.kept.put(index, batch, state)
                self.passing.drop(index, batch)
                after = self.teacher.architecture.run_block(block, state)
                self.passing.put(index + 1, batch, after)
            self.reached = index + 1
            self.waiting |= {index} & later

    def clear(self) -> None:
        self.passing.clear()
        self.kept.clear()

    def _inputs(self, batch: int):
        """Batch `batch` of this round: the calibration set's batches in turn, with fresh noise and
        timesteps."""
        count = self.number * self.settings.wanted_batches + batch
        return self.calibration.fresh(
            count % len(self.calibration), draw_seed(self.settings.seed, count)
        )


def unfinished(number: int, updates: int) -> set[int | None]:
    """Steps done (None: not begun) of a student that this round has to train."""
    return ({None} if number == 0 else set()) | set(range(number * updates, (number + 1) * updates))
