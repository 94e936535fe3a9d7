"""The teacher's states that a round of training keeps: how many at a time, and how many of them on
disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..algorithms.distillation.round_cache import IN_MEMORY, REUSE, most_kept, waiting
from ..models.streaming import room_for_states
from ..settings.prune_settings import DistillDepthConfig, DistillWidthConfig
from .counts import Count


@dataclass(frozen=True, kw_only=True)
class RoundStates:
    """Counted as `rounds.FreshStates` keeps them."""

    read: Sequence[set[int]]
    """the boundaries that each part learns from"""
    updates: int
    batches: int
    batch: float
    """bytes of one at a boundary"""
    room: float
    """bytes of the host's memory for those of streamed stages"""

    @classmethod
    def of(
        cls,
        count: Count,
        config: DistillDepthConfig | DistillWidthConfig,
        read: Sequence[set[int]],
    ) -> RoundStates:
        batch = count.samples.batch * count.state
        wanted = math.ceil(config.updates / REUSE)
        fitting = config.cache_gb * 1e9 // (most_kept(read) * batch) if config.cache_gb else wanted
        return cls(
            read=read,
            updates=config.updates,
            batches=max(1, min(wanted, int(fitting))),
            batch=batch,
            room=room_for_states(IN_MEMORY),
        )

    @property
    def boundary(self) -> float:
        """Bytes of all batches at one."""
        return self.batches * self.batch

    @property
    def most(self) -> float:
        """Bytes of those that are there together."""
        return most_kept(self.read) * self.boundary

    @property
    def passing_on_disk(self) -> float:
        """The share of the boundary that the sweep has come to."""
        return max(0, 1 - self.room / self.boundary)

    @property
    def kept_on_disk(self) -> float:
        """The share of those that wait for a part's end."""
        left, size = max(0, self.room - self.boundary), self.most - self.boundary
        return max(0, 1 - left / size) if size else 0

    @property
    def in_memory(self) -> float:
        """Bytes of the host's memory that a streamed stage's take."""
        return min(self.room, self.most)

    def swept(self, last: int) -> float:
        """Bytes on disk of one sweep to this boundary, written and read again."""
        passing, kept = self.passing_on_disk * (last + 1), self.kept_on_disk
        return self.boundary * (passing + kept * len(waiting(self.read)))

    def used(self, times: float) -> float:
        """Bytes read from disk when every part reads its states of so many batches."""
        shares = sum(
            self.passing_on_disk if boundary == max(part) else self.kept_on_disk
            for part in self.read
            for boundary in part
        )
        return times * self.batch * shares
