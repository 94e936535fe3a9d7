"""Trainings of many parts side by side, a round of each in turn: in memory between their rounds as
far as it goes, on disk as seldom as is safe.

A file at full size is 4.3 GB, and a stage has hundreds of rounds: read and written in each of them,
it is terabytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from ...system.distributed import processes
from ...system.interruption import Stopped
from ...system.machine import free_memory
from ...system.progress import saved
from .trainer import Diverged, Trainer, saved_step

SHARE = (
    0.35  # of the memory that is free when training begins; states come first, they are read more
)
MOST_WRITTEN = 5e11  # bytes of all saves of a stage
MOST_UNSAVED = 0.1  # of its rounds

TrainedPart = TypeVar("TrainedPart", bound=Hashable)


class KeptTrainers(Generic[TrainedPart]):
    """By part, such as an interval. A training that was stopped goes on from its file to the same
    bits, so it makes no difference when it is saved."""

    def __init__(
        self,
        path_of: Callable[[TrainedPart], Path],
        settings_of: Callable[[TrainedPart], str],
        rounds: int,
        limit: float | None = None,
    ):
        self.path_of, self.settings_of, self.rounds = path_of, settings_of, rounds
        self.limit = SHARE * free_memory() if limit is None else limit
        self.trainers: dict[TrainedPart, Trainer] = {}
        self.sizes: dict[TrainedPart, int] = {}

    def step(self, part: TrainedPart) -> int | None:
        """Updates done; None of what was not begun. Raises ValueError for a file of other
        settings."""
        if part in self.trainers:
            return self.trainers[part].step
        return saved_step(self.path_of(part), self.settings_of(part))

    def take(self, part: TrainedPart, device: str) -> Trainer | None:
        """What is kept in memory of it, back on its device; from then on it is the caller's."""
        trainer = self.trainers.pop(part, None)
        return trainer and trainer.to(device)

    def put(self, part: TrainedPart, trainer: Trainer) -> None:
        """At the end of a part's round: keeps it, or saves it where there is no room. Raises
        Diverged for what is not finite."""
        trainer.finite_tensors(self.path_of(part))
        trainer.optimizer.zero_grad()
        self.sizes[part] = trainer.bytes
        fits = sum(self.sizes[other] for other in self.trainers) + trainer.bytes <= self.limit
        if processes().any(not fits):  # those that share its batches do the same
            self.save(part, trainer)
        else:
            self.trainers[part] = trainer.to("cpu")

    def save(self, part: TrainedPart, trainer: Trainer) -> None:
        trainer.save(self.path_of(part), self.settings_of(part))

    def end_round(self, number: int) -> None:
        """Saves everything in memory when its time has come."""
        if (number + 1) % rounds_between_saves(
            self.rounds, sum(self.sizes.values())
        ) == 0 or number + 1 == self.rounds:
            self.save_all()
            saved()

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """What is in memory stands at the end of a round, so it is good whatever became of the part
        that was in training."""
        try:
            yield
        except (Stopped, Diverged):
            self.save_all()
            raise

    def save_all(self) -> None:
        for part, trainer in self.trainers.items():
            if trainer.step != trainer.saved:
                self.save(part, trainer)


def rounds_between_saves(rounds: int, held: float) -> int:
    """As many as keep all saves of `held` bytes within MOST_WRITTEN, but no more than MOST_UNSAVED
    of all rounds."""
    return max(1, min(math.ceil(rounds * held / MOST_WRITTEN), int(MOST_UNSAVED * rounds)))
