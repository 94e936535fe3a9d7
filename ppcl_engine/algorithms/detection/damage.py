"""Damage: squared error of the final velocity relative to the teacher's (or another variant's), on
fixed inputs.

Layouts go through the blocks together, so that a block is read once for all of them, and layouts
that are alike up to a block are one up to there. What they need of memory is a state a batch of
every layout that has gone its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ...architectures.modules import AnyModule
from ...models.assembly import Students
from ...models.layout import Layout, Place, layout_of
from ...models.streaming import Teacher, state_of, streams_of
from ...models.surgery import project
from ...plan import FULL, PruningPlan, Variant
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
"""is shown (layout, batch, velocity)"""
Way = tuple[list[Places], list[dict[str, torch.Tensor]]]
"""layouts that are alike so far, and their streams, a batch each"""


class Damage:
    """projections: where those of a place are, if not among the students' own. cache_gb: memory for
    states."""

    def __init__(
        self,
        teacher: Teacher,
        students: Students,
        plan: PruningPlan,
        inputs: list,
        reference: Variant | None = None,
        projections: ProjectionOf | None = None,
        cache_gb: float = CACHE_GB,
    ):
        self.teacher, self.students, self.plan, self.cache_gb = teacher, students, plan, cache_gb
        self.projections = projections or self._trained
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
        """Raises ValueError for a variant whose velocity is not finite."""
        error, power = self.per_sample(layout_of(self.plan, variant))
        check_finite(
            {"velocity": error},
            f"variant {variant.name!r}",
            "train its parts again, at a lower --learning-rate",
        )
        return float(error.sum() / power.sum())

    def per_sample(self, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of the velocity and its own square, each summed over a sample."""
        self.measure([layout])
        return self.known[layout.places]

    def measure(self, layouts: Sequence[Layout], what: str | None = None) -> None:
        """`per_sample` of all of them, in as few walks through the blocks as memory allows; what is
        known already is not measured again. what: of the bar."""
        wanted = list(
            dict.fromkeys(layout.places for layout in layouts if layout.places not in self.known)
        )
        found: dict[Places, dict[int, torch.Tensor]] = {places: {} for places in wanted}

        def compare(places: Places, batch: int, velocity: torch.Tensor) -> None:
            found[places][batch] = squares(velocity - self.target[batch]).cpu()

        self._walk_all(wanted, compare, what)
        power = self._per_sample(self.target)
        for places, errors in found.items():
            self.known[places] = (
                torch.cat([errors[batch] for batch in range(len(self.embedded))]),
                power,
            )

    def _keep(self, _: Places, batch: int, velocity: torch.Tensor) -> None:
        self.target[batch] = velocity

    def _per_sample(self, velocities: dict[int, torch.Tensor]) -> torch.Tensor:
        return torch.cat([squares(velocities[batch]).cpu() for batch in range(len(self.embedded))])

    def _walk_all(self, layouts: list[Places], seen: Seen, what: str | None) -> None:
        walks = list(self._grouped(sorted(layouts, key=self._parts_ways))) if layouts else []
        total = len(walks) * self.teacher.num_blocks
        hidden = {"disable": True} if what is None else {}
        with Progress(total=total, desc=what, unit="block", **hidden) as progress:
            for group, batches in walks:
                for some, streams in self._walk(group, batches, progress):
                    for batch, stream in zip(batches, streams, strict=True):
                        state = state_of(stream, self.embedded[batch])
                        velocity = self.teacher.architecture.finish(
                            self.teacher.outer, state
                        ).float()
                        for places in some:
                            seen(places, batch, velocity)

    def _grouped(self, layouts: list[Places]) -> Iterator[tuple[list[Places], list[int]]]:
        """All layouts and as many batches as memory holds; where it does not hold one batch, a
        batch and fewer layouts."""
        largest = max(state.image.nbytes + state.text.nbytes for state in self.embedded)
        fitting, batches = max(1, int(self.cache_gb * 1e9 // largest)), range(len(self.embedded))
        if fitting < len(layouts):
            parts = [layouts[first : first + fitting] for first in range(0, len(layouts), fitting)]
            yield from ((part, [batch]) for batch in batches for part in parts)
            return
        count = fitting // len(layouts)
        yield from (
            (layouts, list(batches[first : first + count]))
            for first in range(0, len(batches), count)
        )

    def _parts_ways(self, places: Places) -> int:
        """The first place that is not the reference's: neighbours in this order have long ways in
        common."""
        pairs = zip(places, self.reference, strict=False)
        return next(
            (ours.index for ours, theirs in pairs if ours != theirs), self.teacher.num_blocks
        )

    def _walk(self, layouts: list[Places], batches: list[int], progress: Progress) -> list[Way]:
        """The streams of all layouts behind the last block."""
        standing = {places: {place.index: place for place in places} for places in layouts}
        needed = sorted(
            {place.index for places in layouts for place in places if not place.interval}
        )
        ways: list[Way] = [
            (layouts, [streams_of(self.embedded[batch], self.rest) for batch in batches])
        ]
        blocks = self.teacher.blocks(needed)
        for index in range(self.teacher.num_blocks):
            block = next(blocks)[1] if index in needed else None
            ways = self._through(index, block, ways, standing, batches)
            progress.update()
        return ways

    def _through(
        self, index: int, block: nn.Module | None, ways: list[Way], standing: Standing, batches
    ) -> list[Way]:
        """Every way through what stands at the place; where its layouts differ, it parts."""
        onward: list[Way] = []
        built: dict[Place, nn.Module] = {}
        while ways:
            layouts, streams = ways.pop(0)
            parted: dict[Place | None, list[Places]] = {}
            for places in layouts:
                parted.setdefault(standing[places].get(index), []).append(places)
            for place, some in parted.items():
                if place is None:
                    onward.append((some, streams))
                    continue
                if place not in built:
                    built[place] = self._built(place, block)
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

    def _built(self, place: Place, block: AnyModule) -> nn.Module:
        """What stands there: the teacher's block that was read for all, or a student; with its
        projections."""
        if place.interval:
            block = self.students.student(place.interval, self.teacher.dtype, self.teacher.device)
        elif not place.projections and not place.publishes:
            return block
        else:
            block = twin(block)
        return project(
            self.teacher.architecture,
            block,
            place,
            {},
            lambda _, kind: self.projections(place, kind),
        )

    def _trained(self, place: Place, kind: str) -> dict[str, torch.Tensor]:
        return self.students.projection(place.name, kind, self.teacher.dtype, self.teacher.device)
