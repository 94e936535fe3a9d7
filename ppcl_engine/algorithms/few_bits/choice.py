"""Which matrix is stored in which format, and which intervals are replaced, under one budget of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...models.layout import Place
from ...plan import Interval
from ..budgets import Front, either, front, together
from .measuring import Damages
from .rounding import Layers, Matrix

MOST = 4000  # ways that are kept of a sum: steps of a 4,000th of the model's size


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is decided of a place: its matrices' formats. All else in it is as it is."""

    place: Place
    matrices: Sequence[Matrix]
    rest: int
    """bytes of its other tensors"""


@dataclass(frozen=True)
class Choice:
    """A way within the budget."""

    stores: Mapping[tuple[str, Layers], str]
    """(place's name, layers of a matrix) -> its format"""
    intervals: tuple[str, ...]
    """names of those that are replaced, of those that could be"""
    bytes: int
    damage: float
    """predicted: of the velocity, squared and relative"""


def choose(
    parts: Sequence[Part],
    students: Sequence[tuple[Interval, Part]],
    damages: Damages,
    budget: int,
) -> Choice | int:
    """The least damage within the budget, or the bytes of the smallest way where none is.

    parts: of the model's places. students: intervals that may be replaced, with a score, and what then
    stands there in place of the parts.
    """
    fronts = {part.place.index: _of_part(part, damages) for part in parts}
    whole: list[Front] = []
    for interval, student in students:
        kept = together([fronts.pop(block) for block in interval.blocks], MOST)
        replaced = front([(0, interval.score or 0.0, interval)])
        whole.append(either(kept, together([replaced, _of_part(student, damages)], MOST)))
    total = together([*fronts.values(), *whole], MOST)
    way = total.within(budget)
    if way is None:
        return int(total.smallest)
    chosen = total.chosen(way)
    intervals = sorted((c for c in chosen if isinstance(c, Interval)), key=lambda i: i.first)
    stores = [c for c in chosen if isinstance(c, tuple)]
    return Choice(
        {(name, layers): store for name, layers, store in stores},
        tuple(interval.name for interval in intervals),
        int(total.size[way]),
        float(total.damage[way]),
    )


def _of_part(part: Part, damages: Damages) -> Front:
    name = part.place.name
    fronts = [
        front(
            (size, damages[name, matrix.layers][store], (name, matrix.layers, store))
            for store, size in matrix.sizes.items()
        )
        for matrix in part.matrices
    ]
    return together([front([(part.rest, 0.0, None)]), *fronts], MOST)
