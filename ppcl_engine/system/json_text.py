"""JSON of ours, the one place that makes it: never with NaN or infinity, which no other reader
takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any


def json_text(value: Any, **options: Any) -> str:
    """`json.dumps` with its options. Raises ValueError naming the place of a number that is not
    finite."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        place, found = next(_not_finite(value, ""), ("", None))
        if found is None:  # something else, such as a loop
            raise
    raise ValueError(
        f"{place or 'the value'} is {found}, which JSON does not hold; check the model and the calibration"
    )


def finite_or_none(value: float) -> float | None:
    """For figures that do not always exist, such as a share of nothing."""
    return value if math.isfinite(value) else None


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """(where, number), as "variants[2].damage"."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _not_finite(part, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _not_finite(part, f"{place}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield place, value
