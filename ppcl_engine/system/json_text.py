"""Writes JSON, always without NaN or infinity, which other readers refuse; reads JSON from files
with a bounded depth, refusing names that occur twice and numbers that are not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

MOST_DEPTH = 64
"""deeper than any file that we or a host write; code that walks a value may then call itself"""
LONGEST_NUMBER = 64  # characters; the largest 64-bit integer has 20, a float 24


class NotJSON(ValueError):
    """The message says why, without naming the file."""


def json_text(value: Any, **options: Any) -> str:
    """`json.dumps` with its options. Raises ValueError naming the place of a number that is not
    finite."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        place, number = next(_not_finite(value, ""), ("", None))
        if number is None:  # another error, such as a loop
            raise
    raise ValueError(
        f"{place or 'the value'} is {number}, which JSON cannot hold; check the model and the calibration"
    )


def finite_or_none(value: float) -> float | None:
    """For figures that do not always exist, such as a fraction with a zero denominator."""
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


def parse_json(text: str | bytes) -> object:
    """Raises NotJSON, in one line without the file's name."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_float,
            parse_int=_int,
        )
    except NotJSON:
        raise
    except RecursionError:
        raise NotJSON(f"nested more than {MOST_DEPTH} deep") from None
    except ValueError as error:  # also a UnicodeDecodeError
        raise NotJSON(str(error).splitlines()[0][:200]) from None
    if _is_deeper(value, MOST_DEPTH):
        raise NotJSON(f"nested more than {MOST_DEPTH} deep")
    return value


def shown(text: str, most: int = 80) -> str:
    """A name from a file, in a form that fits into a line of text."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text if text.isprintable() else repr(text)


def _object(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise NotJSON(f"the name {twice[:80]!r} occurs twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise NotJSON(f"{name} is not a finite number")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise NotJSON(f"{text[:20]} is not a finite number")
    return value


def _int(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise NotJSON(f"a number has {len(text)} digits")
    return int(text)


def _is_deeper(value: object, most: int) -> bool:
    level: Iterable[object] = [value]
    for _ in range(most):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
