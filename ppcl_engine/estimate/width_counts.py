"""How many projections detect-width and distil-width fit, in how many sweeps of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..algorithms.detection.width_fits import fits_of, fits_of_blocks_given_back
from ..algorithms.distillation.round_cache import USUAL
from ..algorithms.grouping import groups_within
from ..models.layout import layout_of
from ..plan import FORMS as BOTH
from ..plan import Interval
from ..settings.prune_settings import DetectWidthConfig, DistillWidthConfig
from .counts import EXACT, FP32, Count

FORMS = {"best": 2, "paper": 1, "gated": 1}


@dataclass(frozen=True, kw_only=True)
class CountedFit:
    """A projection to be fitted, and what its normal equations take."""

    last: int
    """the block at whose end its sums are complete"""
    parts: int
    """maps: one, or two where it also moves the text stream on"""
    source: int | None = None
    """the block that a text group reads from; fits of one source share X^T X"""


@dataclass(frozen=True, kw_only=True)
class WidthCounts:
    """The fits of a stage."""

    count: Count
    all_fits: tuple[CountedFit, ...]
    places: int
    """blocks that stay, students among them"""
    layouts: int
    """models whose damage is measured"""
    cache_gb: float
    students: float
    """bytes of the students that the fits ask for"""
    frozen: float = 0
    """bytes of the blocks and students in which projections are trained"""

    @classmethod
    def of(cls, count: Count, config: DetectWidthConfig) -> WidthCounts:
        """Counts all candidates, text groups of every length among them."""
        removed = sum(interval.removed for interval in count.intervals)
        there = count.sizes.architecture.site_kinds(count.sizes.config, count.blocks // 2)
        kinds = [k for k in config.kinds.replace(",", " ").split() if k in there]
        places = count.blocks - removed
        at = [place * count.blocks // places for place in range(places)]
        fits, layouts = [], 0
        for kind in kinds:
            if kind == "text":
                found = list(_text_fits(at, config.longest))
                fits, layouts = fits + found, layouts + len(found)
                continue
            forms = min(FORMS[config.form], len(count.sizes.architecture.forms.get(kind, BOTH)))
            fits += [CountedFit(last=last, parts=1) for last in at for _ in range(forms)]
            layouts += places * forms
        return cls(
            count=count,
            all_fits=tuple(fits),
            places=places,
            layouts=layouts if config.method == "damage" else 0,
            cache_gb=config.cache_gb,
            students=sum(_student(count, interval) for interval in count.intervals),
        )

    @classmethod
    def of_plan(cls, count: Count, config: DistillWidthConfig) -> WidthCounts:
        """Counts the sites of the plan; without a plan, as many FFNs as a quarter of the blocks."""
        block = count.stored_blocks / count.blocks
        if count.plan is None or config.sites:
            number = max(1, len(config.sites.split()) or count.blocks // 4)
            at = [n * count.blocks // number for n in range(number)]
            fits = [CountedFit(last=last, parts=1) for last in at]
            students, frozen = 0.0, number * block
        else:
            plan = count.plan
            found = fits_of(plan, layout_of(plan, plan.everything()))
            found += fits_of_blocks_given_back(plan) if config.give_back else []
            found = list(dict.fromkeys(found))
            fits = [
                CountedFit(
                    last=f.place.last,
                    parts=len(f.parts),
                    source=f.source.last if f.source else None,
                )
                for f in found
            ]
            places = [place for f in found for place in (f.place, f.source) if place]
            students = sum(_student(count, i) for i in {p.interval for p in places if p.interval})
            frozen = sum(_student(count, p.interval) if p.interval else block for p in places)
        return cls(
            count=count,
            all_fits=tuple(fits),
            places=0,
            layouts=0,
            cache_gb=config.cache_gb or USUAL,
            students=students,
            frozen=frozen,
        )

    @property
    def fits(self) -> int:
        return len(self.all_fits)

    @property
    def parts(self) -> list[int]:
        return [fit.parts for fit in self.all_fits]

    @property
    def boundaries(self) -> list[set[int]]:
        """The boundaries that each projection learns from."""
        return [
            {fit.last, fit.last + 1} | (set() if fit.source is None else {fit.source})
            for fit in self.all_fits
        ]

    @property
    def solutions(self) -> float:
        """Bytes of all maps."""
        return FP32 * sum(self.parts) * self.count.width**2

    @property
    def equations(self) -> float:
        """Bytes of the normal equations that are in memory together."""
        limit, whole = self.cache_gb * 1e9, self._bytes(self.all_fits)
        return min(max(limit, max(self._bytes([fit]) for fit in self.all_fits)), whole)

    @property
    def sweeps(self) -> list[int]:
        """The last block of every sweep that fits projections."""
        return [max(fit.last for fit in chunk) for chunk in self._chunks()]

    def _bytes(self, fits) -> float:
        """As `width_solutions` divides them: X^T Y of every part, X^T X of every part or source."""
        own = sum(fit.parts for fit in fits if fit.source is None)
        shared = {
            (fit.source, part)
            for fit in fits
            if fit.source is not None
            for part in range(fit.parts)
        }
        matrices = sum(fit.parts for fit in fits) + own + 2 * len(shared)
        return EXACT * (self.count.width + 1) ** 2 * matrices

    def _chunks(self) -> Iterator[list[CountedFit]]:
        return groups_within(self.cache_gb * 1e9, self.all_fits, self._bytes)

    def swept(self, states: float) -> tuple[float, float]:
        """Bytes of states that these sweeps read and write: a block's input for the sweep and for
        each place that is observed, its output for the text groups that end there."""
        reads = sum(
            2 * (last + 1) + len({f.last for f in chunk})
            for last, chunk in zip(self.sweeps, self._chunks(), strict=True)
        )
        writes = sum(last + 2 for last in self.sweeps)
        return reads * states, writes * states

    def walks(self, config: DetectWidthConfig, samples: int) -> float:
        """Walks of the reference and of all candidates, which begin where they differ from it."""
        return measuring_walks(self.layouts, samples * self.count.state, config.cache_gb)

    def students_read(self) -> float:
        """A student is read once in every sweep that fits projections."""
        return len(self.sweeps) * self.students


def measuring_walks(layouts: int, states: float, cache_gb: float) -> float:
    """Through all blocks, to measure the damage of layouts that differ from the reference at all
    places alike: of the reference, once more to keep its states, and of layouts that go through
    half of the blocks in the mean. states: bytes that one layout needs."""
    groups = max(1, math.ceil(layouts * states / (cache_gb * 1e9)))
    return 2 if groups == 1 else 2 + groups * (groups + 1) / (2 * groups)


def _student(count: Count, interval: Interval) -> float:
    """Bytes in its training's file that the model is made of."""
    return FP32 * count.sizes.student(interval)


def _text_fits(at: list[int], longest: int) -> Iterator[CountedFit]:
    """Every place behind each source, as far as a group may reach."""
    for start in range(1, len(at)):
        for end in range(start, min(len(at), start + longest)):
            yield CountedFit(last=at[end], parts=2, source=at[start - 1])
