"""Students in closed form, before any training: an interval's first block, and the least-squares map
from what it returns to the teacher's state behind the interval. Detection measured their damage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...architectures import Inputs
from ...models.cost import CORRECTION
from ...models.streaming import StateStore, Teacher, sweep
from ...models.surgery import filled_student
from ...models.weights import Weights
from ...plan import Interval
from ..least_squares import RIDGE, NormalEquations
from .stream_maps import Maps


@dataclass(frozen=True)
class ClosedForms:
    """The students of a plan: one of the `models.assembly.Students`, without projections."""

    weights: Weights
    """of the teacher"""
    maps: dict[str, Maps]
    """interval -> the map of each stream"""

    def student(self, interval: Interval, dtype: torch.dtype, device: str) -> nn.Module:
        state = self.weights.block(interval.first, dtype, device).state_dict()
        for stream, (weight, bias) in self.maps[interval.name].items():
            state[f"{CORRECTION}{stream}.weight"] = weight.to(device, dtype)
            state[f"{CORRECTION}{stream}.bias"] = bias.to(device, dtype)
        form = replace(interval, correction="affine")
        return filled_student(self.weights.architecture, self.weights.config, form, state)

    def projection(
        self, place: str, kind: str, dtype: torch.dtype, device: str
    ) -> dict[str, torch.Tensor]:
        raise ValueError(f"projection {kind} of block {place} is not trained; run distill-width")

    def tuned(self, variant: str, key: str) -> torch.Tensor:
        raise ValueError(f"variant {variant!r} is not trained; run finetune")


def closed_forms(
    teacher: Teacher,
    inputs: Sequence[Inputs],
    intervals: Sequence[Interval],
    store: StateStore,
    passed: Callable[[], None] = lambda: None,
) -> ClosedForms:
    """Fits all students in one sweep of the teacher. Intervals do not overlap, so the states behind
    one first block wait at a time. Calls passed() at every block."""
    embedded = [teacher.embed(row) for row in inputs]
    begins = {interval.first: interval for interval in intervals}
    ends = {interval.last: interval for interval in intervals}
    maps: dict[str, Maps] = {}
    for index, _, batches in sweep(teacher, embedded, store, max(ends)):
        passed()
        if index in begins:
            for batch in batches:
                store.put("begin", batch, store.get(index + 1, batch, embedded[batch]))
        if index in ends:
            maps[ends[index].name] = _fitted(teacher, index, embedded, store)
    store.clear()
    return ClosedForms(teacher.weights, maps)


def _fitted(teacher: Teacher, last: int, embedded: list, store: StateStore) -> Maps:
    """From the states that wait to those behind block `last`, of every stream that is read later."""
    width = teacher.architecture.width(teacher.config)
    equations = {
        s: NormalEquations(width, width, teacher.device) for s in teacher.used_streams(last)
    }
    for batch, like in enumerate(embedded):
        before, after = store.get("begin", batch, like), store.get(last + 1, batch, like)
        for stream, sums in equations.items():
            x = before.real_tokens(stream).float()
            sums.add(x, after.real_tokens(stream).float() - x)
    solved = {stream: sums.solve(RIDGE) for stream, sums in equations.items()}
    return {stream: (s.weight.float(), s.bias.float()) for stream, s in solved.items()}
