"""How many of the teacher's states a round of training keeps: as many batches as --cache-gb holds.

The fewer batches a round has, the more updates each of them serves, so the cache decides the
result. What a training began with is therefore kept when it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...architectures import BlockState
from ...data.calibration import CalibrationSet
from ...models.streaming import Teacher
from ...settings.prune_settings import DistillDepthConfig, DistillWidthConfig
from ...system.distributed import processes, tell
from ...system.machine import free_disk, free_memory
from ...system.tensor_files import TensorFile
from .saved_training import settings_of

REUSE = 4  # updates from one cached batch
SPARE = 0.8  # of what is free, at most, is taken
USUAL = 8.0  # GB
IN_MEMORY = 0.35  # of the host's free memory, for the states of a streamed round


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """What a round is made of."""

    updates: int
    """of each part in a round"""
    cache_gb: float
    """of states that are kept for it"""
    boundaries: int
    """that the cache holds at a time: the same whichever parts are trained, so that training some
    of them first changes nothing"""
    seed: int

    @property
    def wanted_batches(self) -> int:
        """How many batches a round is meant to have, so that each cached batch serves REUSE updates."""
        return math.ceil(self.updates / REUSE)

    def batch_bytes(self, state: BlockState) -> int:
        """Bytes that one batch takes in the cache, with the rows of all processes."""
        of_these_rows = torch.tensor(state.image.nbytes + state.text.nbytes)
        return self.boundaries * int(processes().sum(of_these_rows))

    def batches_that_fit(self, state: BlockState) -> int:
        """Raises ValueError if not one does."""
        size = self.batch_bytes(state)
        fitting = int(self.cache_gb * 1e9 // size)
        if not fitting:
            raise ValueError(
                f"--cache-gb {self.cache_gb:g} is too small for one batch, which needs {size / 1e9:.2f} GB; raise it, or "
                "calibrate with a smaller --batch"
            )
        return min(self.wanted_batches, fitting)


def waiting(read: Iterable[set[int]]) -> set[int]:
    """Boundaries that wait while the sweep goes on: each part is trained when the sweep is at the
    last of those that it reads."""
    return {boundary for part in read for boundary in part if boundary < max(part)}


def most_kept(read: Iterable[set[int]]) -> int:
    """How many boundaries are there together at most, where parts read these."""
    ordered = sorted(read, key=max)
    return max(
        1 + sum(boundary < max(part) for boundary in waiting(ordered[position:]))
        for position, part in enumerate(ordered)
    )


@dataclass(frozen=True, kw_only=True)
class RoundCache:
    """Where the states of a stage's rounds will be, and what they take."""

    teacher: Teacher
    calibration: CalibrationSet
    boundaries: int
    """as RoundSettings has them"""
    folder: Path | None
    """None: memory"""

    def chosen(
        self, config: DistillDepthConfig | DistillWidthConfig, trainings: Iterable[Path]
    ) -> float:
        """GB: --cache-gb; where it is 0 that of a training that has begun, else what all batches of
        a round take, or as much of it as there is room for."""
        if config.cache_gb:
            return config.cache_gb
        begun = (settings_of(TensorFile(path)) for path in trainings if path.exists())
        known = next((s["cache_gb"] for s in begun if isinstance(s.get("cache_gb"), float)), 0.0)
        if known > 0:
            return known
        settings = self.settings(config)
        size = settings.batch_bytes(self._first())
        wanted, room = settings.wanted_batches * size, SPARE * self.free()
        if wanted <= room:
            return max(USUAL, math.ceil(wanted / 1e8) / 10)
        if processes().count > 1:
            raise ValueError(
                f"the states of a round take {wanted / 1e9:.1f} GB, and {self.free() / 1e9:.1f} GB are free {self.where()}; "
                "say with --cache-gb how much of it they may take, since several processes must agree on it"
            )
        return room / 1e9

    def settings(self, config: DistillDepthConfig | DistillWidthConfig) -> RoundSettings:
        return RoundSettings(
            updates=config.updates,
            cache_gb=config.cache_gb,
            boundaries=self.boundaries,
            seed=config.seed,
        )

    def tell_reuse(self, settings: RoundSettings) -> None:
        """Before the first round: that a small cache makes every batch serve more updates, which
        changes the training; and what would help with what is free."""
        size, wanted = settings.batch_bytes(self._first()), settings.wanted_batches
        fitting = int(settings.cache_gb * 1e9 // size)
        if not 0 < fitting < wanted:
            return
        free = self.free()
        room = min(wanted, int(SPARE * free // size))
        advice = "free more, or use fewer --updates"
        if room > fitting:
            advice = f"--cache-gb {math.ceil(room * size / 1e8) / 10:g} holds {'all' if room == wanted else room}"
        tell(
            f"--cache-gb {settings.cache_gb:g} holds {fitting} of the {wanted} batches that a round is meant to have, so "
            f"each serves {settings.updates / fitting:.3g} updates in it instead of {REUSE}; {advice} ({free / 1e9:.1f} GB "
            f"are free {self.where()})"
        )

    def free(self) -> int:
        return free_memory(self.teacher.device) if self.folder is None else free_disk(self.folder)

    def where(self) -> str:
        return "of memory" if self.folder is None else f"at {self.folder.parent}"

    def _first(self) -> BlockState:
        return self.teacher.embed(self.calibration.inputs(0))
