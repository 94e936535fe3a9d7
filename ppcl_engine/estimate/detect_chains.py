"""The chains that detect measures, in the groups that walk through the model together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..algorithms.detection.chains import ChainBatch, bytes_of, chain_batches
from ..algorithms.detection.intervals import reach
from ..algorithms.grouping import groups_within
from ..settings.prune_settings import DetectConfig
from .counts import Count


@dataclass(frozen=True, kw_only=True)
class DetectChains:
    """Counted as `detection.chains` walks them."""

    ends: Mapping[int, int]
    """block -> the last one that its chains may replace"""
    groups: Sequence[Sequence[ChainBatch]]
    batches: int
    batch: float
    """bytes of its states at a boundary"""

    @classmethod
    def of(cls, count: Count, config: DetectConfig) -> DetectChains:
        share = min(config.samples, count.samples.count) / count.samples.count
        batches, batch = max(2, round(share * count.batches)), count.samples.batch * count.state
        starts = frozenset(s.start for s in count.sizes.architecture.sections(count.sizes.config))
        last = count.blocks - 1
        ends = {u: reach(u, count.blocks, config.longest, starts) for u in range(last)}
        chains = chain_batches(ends, [batch] * batches, count.width, config.local)
        limit = config.cache_gb * 1e9 if config.streamed else 0
        groups = list(groups_within(limit, chains, bytes_of))
        return cls(ends=ends, groups=groups, batches=batches, batch=batch)

    @property
    def held_out(self) -> int:
        """Batches that the maps are not fitted to."""
        return self.batches - self.batches // 2

    @property
    def states(self) -> float:
        """Bytes of all batches at a boundary."""
        return self.batches * self.batch

    @property
    def pairs(self) -> int:
        """Intervals that are measured."""
        return sum(end - u for u, end in self.ends.items())

    @property
    def in_memory(self) -> float:
        """Bytes of the largest group's states and maps."""
        return max(map(bytes_of, self.groups), default=0)
