"""Damage: squared error of the final velocity relative to the teacher's (or another variant's), on
fixed inputs."""

from __future__ import annotations

import torch
from torch import nn

from ...architectures import SharedText
from ...models.assembly import Students, placed_block
from ...models.layout import Layout, Place, layout_of
from ...models.streaming import Teacher
from ...plan import FULL, PruningPlan, Variant


class Damage:
    """Walks a layout place by place over all inputs; memory holds what the teacher holds and one
    trained place."""

    def __init__(
        self,
        teacher: Teacher,
        students: Students,
        plan: PruningPlan,
        inputs: list,
        reference: Variant | None = None,
    ):
        self.teacher, self.students, self.plan = teacher, students, plan
        self.embedded = [teacher.embed(row) for row in inputs]
        self.target = self._velocities(layout_of(plan, reference or Variant(name=FULL)))

    def of(self, variant: Variant) -> float:
        error, power = self.per_sample(layout_of(self.plan, variant))
        return float(error.sum() / power.sum())

    def per_sample(self, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of the velocity and its own square, each summed over a sample."""
        pairs = list(zip(self._velocities(layout), self.target, strict=True))
        return torch.cat([_squares(a - b) for a, b in pairs]), torch.cat(
            [_squares(b) for _, b in pairs]
        )

    def _velocities(self, layout: Layout) -> list[torch.Tensor]:
        states, shared = list(self.embedded), {}
        untouched = self.teacher.blocks(
            [p.index for p in layout.places if p.is_teacher and not p.publishes]
        )
        for place in layout.places:
            plain = place.is_teacher and not place.publishes
            block = next(untouched)[1] if plain else self._placed(place, shared)
            states = [self.teacher.architecture.run_block(block, state) for state in states]
        return [
            self.teacher.architecture.finish(self.teacher.outer, state).float() for state in states
        ]

    def _placed(self, place: Place, shared: dict[int, SharedText]) -> nn.Module:
        teacher = self.teacher
        return placed_block(
            teacher.weights, self.students, place, teacher.dtype, teacher.device, shared
        )


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().flatten(1).sum(1).cpu()
