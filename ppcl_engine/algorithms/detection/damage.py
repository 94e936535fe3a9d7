"""Damage: squared error of the final velocity, relative to the teacher's (or another variant's), on
fixed inputs.

Layouts go through the blocks together, so that each block is read once for all of them, and layouts
share their states as long as they are alike. Memory holds one state a batch for every layout that
has become different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...architectures.modules import AnyModule
from ...models.assembly import Students
from ...models.layout import Layout, Place, layout_of
from ...models.streaming import StateStore, Teacher, state_of, streams_of
from ...models.surgery import project
from ...plan import FULL, Interval, PruningPlan, Variant
from ...system.finite import check_finite, checked_velocity
from ...system.progress import Progress
from ..distillation.trainable import twin
from ..resampling import squares

CACHE_GB = 8.0

Places = tuple[Place, ...]
ProjectionOf = Callable[[Place, str], dict[str, torch.Tensor]]
"""(place, site kind) -> the tensors of its projection"""
Standing = dict[Places, dict[int, Place]]
"""layout -> index -> what stands there"""
Seen = Callable[[Places, int, torch.Tensor], None]
"""is called with (layout, batch, velocity)"""
Branch = tuple[list[Places], list[dict[str, torch.Tensor]]]
"""layouts that are alike so far, and their streams, one entry a batch"""


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Layouts that go through the blocks together."""

    layouts: list[Places]
    batches: Sequence[int]
    first: int
    """the block that they begin at; before it they are as the reference"""


class Damage:
    """Measures the damage of variants.

    projections: where a place's projections are, if not among the students'. cache_gb: memory for
    states. store: where the reference's states wait, so that layouts go on from where they differ
    from it; without it they begin at the first block.
    """

    def __init__(
        self,
        teacher: Teacher,
        students: Students,
        plan: PruningPlan,
        inputs: list,
        reference: Variant | None = None,
        projections: ProjectionOf | None = None,
        cache_gb: float = CACHE_GB,
        store: StateStore | None = None,
    ):
        self.teacher, self.students, self.plan, self.cache_gb = teacher, students, plan, cache_gb
        self.projections = projections or self._trained
        self.store = store
        self.embedded = [teacher.embed(row) for row in inputs]
        self.rest = "cpu" if teacher.streamed else None
        reference = reference or Variant(name=FULL)
        self.reference = layout_of(plan, reference).places
        self.target: dict[int, torch.Tensor] = {}
        self._walk_all([self.reference], self._keep, "reference")
        for velocity in self.target.values():
            checked_velocity(velocity, f"variant {reference.name!r}")
        power = self._per_sample(self.target)
        self.known = {self.reference: (torch.zeros_like(power), power)}

    def of(self, variant: Variant) -> float:
        """The damage of a variant. Raises ValueError where its velocity is not finite."""
        error, power = self.per_sample(layout_of(self.plan, variant))
        check_finite(
            {"velocity": error},
            f"variant {variant.name!r}",
            "train its parts again, at a lower --learning-rate",
        )
        return float(error.sum() / power.sum())

    def per_sample(self, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of the velocity, and square of the reference's velocity, each summed over a
        sample."""
        self.measure([layout])
        return self.known[layout.places]

    def measure(self, layouts: Sequence[Layout], what: str | None = None) -> None:
        """`per_sample` for all layouts, in as few walks through the blocks as memory allows; known
        ones are not measured again.

        what: the progress bar's label.
        """
        wanted = list(
            dict.fromkeys(layout.places for layout in layouts if layout.places not in self.known)
        )
        errors_of: dict[Places, dict[int, torch.Tensor]] = {places: {} for places in wanted}

        def compare(places: Places, batch: int, velocity: torch.Tensor) -> None:
            errors_of[places][batch] = squares(velocity - self.target[batch]).cpu()

        self._walk_all(wanted, compare, what)
        power = self._per_sample(self.target)
        for places, errors in errors_of.items():
            self.known[places] = (
                torch.cat([errors[batch] for batch in range(len(self.embedded))]),
                power,
            )

    def _keep(self, _: Places, batch: int, velocity: torch.Tensor) -> None:
        self.target[batch] = velocity

    def _per_sample(self, velocities: dict[int, torch.Tensor]) -> torch.Tensor:
        return torch.cat([squares(velocities[batch]).cpu() for batch in range(len(self.embedded))])

    def _walk_all(self, layouts: list[Places], seen: Seen, what: str | None) -> None:
        walks = (
            list(self._grouped(sorted(layouts, key=self._first_changed_block))) if layouts else []
        )
        if self.store is not None and len(walks) > 1:
            self._remember({walk.first for walk in walks}, self.store)
        else:
            walks = [replace(walk, first=0) for walk in walks]
        total = sum(self.teacher.num_blocks - walk.first for walk in walks)
        hidden = {"disable": True} if what is None else {}
        with Progress(total=total, desc=what, unit="block", **hidden) as progress:
            for walk in walks:
                for some, streams in self._walk(walk, progress.update):
                    for batch, stream in zip(walk.batches, streams, strict=True):
                        state = state_of(stream, self.embedded[batch])
                        velocity = self.teacher.architecture.finish(
                            self.teacher.outer, state
                        ).float()
                        for places in some:
                            seen(places, batch, velocity)
        if self.store is not None:
            self.store.clear()

    def _grouped(self, layouts: list[Places]) -> Iterator[Walk]:
        """As many layouts as memory holds of all batches, so that what they have of their own is
        read once; where it does not even hold one of all batches, single layouts and fewer
        batches."""
        largest = max(state.image.nbytes + state.text.nbytes for state in self.embedded)
        batches = range(len(self.embedded))
        fitting = max(1, int(self.cache_gb * 1e9 // largest))
        some, together = max(1, fitting // len(batches)), min(fitting, len(batches))
        for first in range(0, len(layouts), some):
            group = layouts[first : first + some]
            for batch in range(0, len(batches), together):
                yield Walk(
                    layouts=group,
                    batches=batches[batch : batch + together],
                    first=min(self._first_changed_block(group[0]), self.teacher.num_blocks - 1),
                )

    def _remember(self, firsts: set[int], store: StateStore) -> None:
        """Stores the reference's states before these blocks."""
        walks = [replace(walk, first=0) for walk in self._grouped([self.reference])]
        total = len(walks) * self.teacher.num_blocks
        with Progress(total=total, desc="reference", unit="block") as progress:
            for walk in walks:

                def passed(index: int, branches: list[Branch], walk: Walk = walk) -> None:
                    if index in firsts:
                        (_, streams), *_ = branches  # the reference is alone
                        for batch, stream in zip(walk.batches, streams, strict=True):
                            state = state_of(stream, self.embedded[batch])
                            store.put(f"before_{index}", batch, state)

                self._walk(walk, progress.update, passed)

    def _before(self, index: int, batch: int) -> dict[str, torch.Tensor]:
        """The streams before a block, as the reference has them."""
        state = self.embedded[batch]
        if index and self.store is not None:
            state = self.store.get(f"before_{index}", batch, state)
        return streams_of(state, self.rest)

    def _first_changed_block(self, places: Places) -> int:
        """The first block at which the layout differs from the reference. Sorted by it, neighbours
        share the most blocks."""
        pairs = zip(places, self.reference, strict=False)
        return next(
            (ours.index for ours, theirs in pairs if ours != theirs), self.teacher.num_blocks
        )

    def _walk(
        self,
        walk: Walk,
        done: Callable[[], object] = lambda: None,
        before: Callable[[int, list[Branch]], None] = lambda index, branches: None,
    ) -> list[Branch]:
        """The streams of all layouts behind the last block. Calls before(block, branches) and done() at
        every block."""
        standing = {places: {place.index: place for place in places} for places in walk.layouts}
        needed = sorted(
            {
                place.index
                for places in walk.layouts
                for place in places
                if not place.interval and place.index >= walk.first
            }
        )
        branches: list[Branch] = [
            (walk.layouts, [self._before(walk.first, b) for b in walk.batches])
        ]
        blocks = self.teacher.blocks(needed)
        for index in range(walk.first, self.teacher.num_blocks):
            before(index, branches)
            block = next(blocks)[1] if index in needed else None
            branches = self._through(index, block, branches, standing, walk.batches)
            done()
        return branches

    def _through(
        self,
        index: int,
        block: nn.Module | None,
        branches: list[Branch],
        standing: Standing,
        batches,
    ) -> list[Branch]:
        """Takes every branch through what stands at the place; it splits where its layouts differ."""
        onward: list[Branch] = []
        built: dict[Place, nn.Module] = {}
        students: dict[Interval, nn.Module] = {}
        while branches:
            layouts, streams = branches.pop(0)
            split: dict[Place | None, list[Places]] = {}
            for places in layouts:
                split.setdefault(standing[places].get(index), []).append(places)
            for place, some in split.items():
                if place is None:
                    onward.append((some, streams))
                    continue
                if place not in built:
                    built[place] = self._built(place, block, students)
                onward.append(
                    (
                        some,
                        [
                            self._run(built[place], s, b)
                            for s, b in zip(streams, batches, strict=True)
                        ],
                    )
                )
        return onward

    def _run(
        self, block: nn.Module, streams: dict[str, torch.Tensor], batch: int
    ) -> dict[str, torch.Tensor]:
        state = self.teacher.architecture.run_block(block, state_of(streams, self.embedded[batch]))
        return streams_of(state, self.rest)

    def _built(
        self, place: Place, block: AnyModule, students: dict[Interval, nn.Module]
    ) -> nn.Module:
        """What stands at a place, with its projections: a student or the teacher's block, each read
        once for all that is tried in it."""
        if place.interval:
            if place.interval not in students:
                students[place.interval] = self.students.student(
                    place.interval, self.teacher.dtype, self.teacher.device
                )
            block = students[place.interval]
        if not place.projections and not place.publishes:
            return block
        return project(
            self.teacher.architecture,
            twin(block),
            place,
            {},
            lambda _, kind: self.projections(place, kind),
        )

    def _trained(self, place: Place, kind: str) -> dict[str, torch.Tensor]:
        return self.students.projection(place.name, kind, self.teacher.dtype, self.teacher.device)
