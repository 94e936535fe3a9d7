"""A round: one sweep of the teacher over fresh samples that leaves the states that students learn
from.

A sweep costs as much as many students' updates, so every cached batch serves several of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ...architectures import BlockState
from ...data.calibration import CalibrationSet
from ...models.streaming import StateStore, Teacher
from ...system.distributed import processes, tell
from ...system.machine import free_disk, free_memory

REUSE = 4  # updates from one cached batch
SPARE = 0.8  # of what is free, at most, is a cache advised to take


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """updates of a student in a round; cache_gb: for `boundaries` states a batch at most, the same
    for any part of a run, so that training some students first changes nothing."""

    updates: int
    cache_gb: float
    boundaries: int
    seed: int

    @property
    def wanted_batches(self) -> int:
        """Of a round, so that a cached batch serves REUSE updates."""
        return math.ceil(self.updates / REUSE)


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
        self.teacher, self.calibration, self.settings, self.number = (
            teacher,
            calibration,
            settings,
            number,
        )
        self.store = StateStore(folder)
        first = teacher.embed(self._inputs(0))
        self.batches = range(self._batches_that_fit(first))
        self.embedded = [first] + [teacher.embed(self._inputs(batch)) for batch in self.batches[1:]]
        with torch.no_grad():
            self._sweep(wanted)

    def state(self, boundary: int, batch: int) -> BlockState:
        return self.store.get(boundary, batch, self.embedded[batch])

    def clear(self) -> None:
        self.store.clear()

    def _sweep(self, wanted: set[int]) -> None:
        for batch, state in enumerate(self.embedded):
            self.store.put(0, batch, state)
        for index, block in self.teacher.walk(0, max(wanted) - 1):
            for batch in self.batches:
                state = self.state(index, batch)
                self.store.put(index + 1, batch, self.teacher.architecture.run_block(block, state))
                if index not in wanted:
                    self.store.drop(index, batch)

    def _inputs(self, batch: int):
        """Batch `batch` of this round: the calibration set's batches in turn, with fresh noise and
        timesteps."""
        count = self.number * self._sweep_batches() + batch
        return self.calibration.fresh(
            count % len(self.calibration), self.settings.seed * 1_000_003 + count
        )

    def _sweep_batches(self) -> int:
        return self.settings.wanted_batches

    def _batches_that_fit(self, state: BlockState) -> int:
        size = batch_bytes(self.settings, state)
        fitting = int(self.settings.cache_gb * 1e9 // size)
        if not fitting:
            raise ValueError(
                f"--cache-gb {self.settings.cache_gb} is too small for one batch, which needs {size / 1e9:.2f}"
            )
        return min(self._sweep_batches(), fitting)


def batch_bytes(settings: RoundSettings, state: BlockState) -> int:
    """That a batch takes of the cache, all processes' rows together."""
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
