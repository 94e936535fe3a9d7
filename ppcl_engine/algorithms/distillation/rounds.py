"""Training in rounds. A round is one sweep of the teacher over fresh samples, which leaves the
states that students learn from; then each of them takes its updates from those.

A sweep costs as much as many students' updates, so every cached batch serves several of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from ...architectures import BlockState
from ...data.calibration import CalibrationSet
from ...models.streaming import StateStore, Teacher, room_for_states
from ...settings.prune_settings import DistillDepthConfig, DistillWidthConfig
from ...system.distributed import processes, tell
from ...system.interruption import stop_on_interrupt
from ...system.machine import free_disk, free_memory
from ...system.progress import Progress
from ...system.seeds import draw_seed
from .kept_trainers import KeptTrainers, TrainedPart
from .loop import Session, train_until
from .trainer import Trainer

REUSE = 4  # updates from one cached batch
SPARE = 0.8  # of what is free, at most, is a cache advised to take


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """What a round is made of."""

    updates: int
    """of each part in a round"""
    cache_gb: float
    """of states that are kept for it"""
    boundaries: int
    """that the cache is divided among: the same whichever parts are trained, so that training some
    of them first changes nothing"""
    seed: int

    @property
    def wanted_batches(self) -> int:
        """How many batches a round is meant to have, so that each cached batch serves REUSE updates."""
        return math.ceil(self.updates / REUSE)


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
    boundaries: int
    """as RoundSettings has them"""
    folder: Path | None
    """of the cached states; None: they stay in memory"""

    def train(self) -> None:
        """Goes on from what is saved. Raises Stopped on Ctrl-C after saving, Diverged with the last
        good state kept."""
        config, course = self.config, self.course
        kept = KeptTrainers(course.path, course.settings, config.rounds)
        steps = config.rounds * config.updates
        done, total = sum(kept.step(part) or 0 for part in self.parts), steps * len(self.parts)
        if done < total:
            tell_reuse(self.teacher, self.calibration, self.settings, self.folder)
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
        return RoundSettings(
            updates=self.config.updates,
            cache_gb=self.config.cache_gb,
            boundaries=self.boundaries,
            seed=self.config.seed,
        )

    def train_round(
        self,
        number: int,
        parts: list[TrainedPart],
        kept: KeptTrainers[TrainedPart],
        session: Session,
    ) -> None:
        """Sweeps the teacher once, then trains each part on the states of that sweep."""
        folder = self.folder and processes().folder(self.folder / f"{self.name}_{number}")
        wanted = set().union(*(self.course.boundaries(part) for part in parts))
        states = FreshStates(self.teacher, self.calibration, self.settings, number, wanted, folder)
        end = (number + 1) * self.config.updates
        for part in parts:
            trainer = kept.take(part, self.teacher.device) or self.course.begin(part, states)
            loss_at = self.course.loss_at(part, trainer, states)
            save = partial(kept.save, part, trainer)
            train_until(end, trainer, loss_at, self.course.name(part), session, save)
            kept.put(part, trainer)
            states.next_part()
        states.clear()
        kept.end_round(number)


class FreshStates:
    """The teacher's states at the wanted block boundaries (i: input of block i), batch by batch."""

    def __init__(
        self,
        teacher: Teacher,
        calibration: CalibrationSet,
        settings: RoundSettings,
        number: int,
        wanted: set[int],
        folder: Path | None,
    ):
        self.teacher, self.calibration = teacher, calibration
        self.settings, self.number = settings, number
        self.store = StateStore(folder)
        room = room_for_states()
        # of boundaries that only the sweep itself passes
        self.passing = StateStore(folder and folder / "passing", room=room)
        self.near = StateStore(None, rest="cpu", room=room)
        first = teacher.embed(self._inputs(0))
        self.batches = range(self._batches_that_fit(first))
        self.embedded = [first] + [teacher.embed(self._inputs(batch)) for batch in self.batches[1:]]
        with torch.no_grad():
            self._sweep(wanted)

    def state(self, boundary: int, batch: int) -> BlockState:
        """A part reads each of its states in many updates; what there is room for stays in
        memory."""
        if self.near.has(boundary, batch):
            return self.near.get(boundary, batch, self.embedded[batch])
        state = self.store.get(boundary, batch, self.embedded[batch])
        if self.store.folder is not None and self.near.fits(state):
            self.near.put(boundary, batch, state)
        return state

    def next_part(self) -> None:
        """Another part reads other states."""
        self.near.clear()

    def clear(self) -> None:
        self.near.clear()
        self.store.clear()

    def _sweep(self, wanted: set[int]) -> None:
        def store(boundary: int) -> StateStore:
            return self.store if boundary in wanted else self.passing

        for batch, state in enumerate(self.embedded):
            store(0).put(0, batch, state)
        for index, block in self.teacher.walk(0, max(wanted) - 1):
            for batch in self.batches:
                state = store(index).get(index, batch, self.embedded[batch])
                after = self.teacher.architecture.run_block(block, state)
                store(index + 1).put(index + 1, batch, after)
                self.passing.drop(index, batch)
        self.passing.clear()

    def _inputs(self, batch: int):
        """Batch `batch` of this round: the calibration set's batches in turn, with fresh noise and
        timesteps."""
        count = self.number * self.settings.wanted_batches + batch
        return self.calibration.fresh(
            count % len(self.calibration), draw_seed(self.settings.seed, count)
        )

    def _batches_that_fit(self, state: BlockState) -> int:
        size = batch_bytes(self.settings, state)
        fitting = int(self.settings.cache_gb * 1e9 // size)
        if not fitting:
            raise ValueError(
                f"--cache-gb {self.settings.cache_gb:g} is too small for one batch, which needs {size / 1e9:.2f} GB; raise it, or "
                "calibrate with a smaller --batch"
            )
        return min(self.settings.wanted_batches, fitting)


def batch_bytes(settings: RoundSettings, state: BlockState) -> int:
    """Bytes that one batch takes in the cache, with the rows of all processes."""
    of_these_rows = torch.tensor(state.image.nbytes + state.text.nbytes)
    return settings.boundaries * int(processes().sum(of_these_rows))


def tell_reuse(
    teacher: Teacher, calibration: CalibrationSet, settings: RoundSettings, folder: Path | None
) -> None:
    """Before the first round: that a small cache makes every batch serve more updates, which
    changes the training; and what would help on the disk that is there (folder None: states stay in
    memory)."""
    size, wanted = (
        batch_bytes(settings, teacher.embed(calibration.inputs(0))),
        settings.wanted_batches,
    )
    fitting = int(settings.cache_gb * 1e9 // size)
    if not 0 < fitting < wanted:
        return
    free = free_memory() if folder is None else free_disk(folder)
    room = min(wanted, int(SPARE * free // size))
    advice = "free more, or use fewer --updates"
    if room > fitting:
        advice = f"--cache-gb {math.ceil(room * size / 1e8) / 10:g} holds {'all' if room == wanted else room}"
    where = "of memory" if folder is None else f"at {folder.parent}"
    tell(
        f"--cache-gb {settings.cache_gb:g} holds {fitting} of the {wanted} batches that a round is meant to have, so each "
        f"serves {settings.updates / fitting:.3g} updates in it instead of {REUSE}; {advice} ({free / 1e9:.1f} GB are free "
        f"{where})"
    )


def unfinished(number: int, updates: int) -> set[int | None]:
    """Steps done (None: not begun) of a student that this round has to train."""
    return ({None} if number == 0 else set()) | set(range(number * updates, (number + 1) * updates))
