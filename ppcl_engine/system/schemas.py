"""What a file may contain, as types with bounds: read by pydantic, and refused in one line that
names the file and the field.

Why pydantic and not msgspec: every ComfyUI already has it, it checks frozen dataclasses as they
are, and it says where a field is. Measured on one machine: importing msgspec takes 46 ms and 0.7
MB, pydantic 71 ms and 9.6 MB (both small beside torch's seconds); both refuse text for numbers in
their strict modes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from .atomic import read_object
from .json_text import NotJSON, parse_json

MOST_BLOCKS = 512
"""of a model; the largest known model has 60"""
SHOWN = 60  # characters of a wrong value

Kind = TypeVar("Kind")
BlockIndex = Annotated[int, Field(ge=0, lt=MOST_BLOCKS)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
"""as far as a float counts too"""
Finite = Annotated[float, Field(allow_inf_nan=False)]
STRICT = {"extra": "forbid", "strict": True}
"""`__pydantic_config__` of dataclasses: no unknown field, no text for a number"""


def read_text(kind: type[Kind], text: str | bytes, where: object) -> Kind:
    """JSON as a value of this kind. Raises ValueError naming `where` and the field."""
    return read_value(kind, read_json_text(text, where), where)


def read_json_text(text: str | bytes, where: object) -> Any:
    """JSON from a file. Raises ValueError naming `where`."""
    try:
        return parse_json(text)
    except NotJSON as error:
        raise ValueError(f"{where}: not JSON ({error})") from None


def read_value(kind: type[Kind], value: object, where: object) -> Kind:
    """A parsed JSON value as a value of this kind: lists become tuples, numbers are not
    converted."""
    try:
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ValueError(_line(kind, error, where)) from None


def read_checked_object(path: Path, kind: type) -> dict:
    """A file's JSON object as it is, once it is known to fit `kind`. Raises ValueError naming file and
    field."""
    values = read_object(path)
    read_value(kind, values, path)
    return values


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def _line(kind: type, error: ValidationError, where: object) -> str:
    """Only the first error."""
    first = error.errors(include_url=False)[0]
    *parents, name = first["loc"] or (None,)
    place = f"{where}: {_place(parents)}: " if parents else f"{where}: "
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _fields_at(kind, parents)
        return f"{place}unknown field {str(name)[:SHOWN]!r}" + (
            f"; known: {', '.join(sorted(known))}" if known else ""
        )
    if first["type"].startswith("missing"):
        return f"{place}the field {name!r} is missing"
    # a dataclass's own check, whose message is complete
    if first["type"] == "value_error" and name is None:
        return f"{where}: {first.get('ctx', {})['error']}"
    said = (
        first["msg"]
        .removeprefix("Value error, ")
        .replace("Input should be", "should be")
        .replace("String should", "should")
    )
    wrong = repr(first["input"])
    wrong = wrong if len(wrong) <= SHOWN else wrong[: SHOWN - 1] + "…"
    return " ".join(f"{where}: {_place(first['loc']) or 'it'} {said}, not {wrong}".split())


def _place(parts: Sequence[int | str]) -> str:
    """ "intervals[0].first" """
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p[:SHOWN]}" for p in parts).removeprefix(
        "."
    )


def _fields_at(kind: type, parents: Sequence[int | str]) -> list[str]:
    return [f.name for f in fields(kind)] if is_dataclass(kind) and not parents else []
