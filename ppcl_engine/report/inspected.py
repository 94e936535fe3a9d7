"""What `ppcl inspect` prints: facts one below the other, lists of things as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..models.cost import STORED_BYTES
from ..system.numbers import bytes_text, count_text

NAME_COLUMN = 16
UNKNOWN = "-"


def text_of_model(facts: Mapping[str, object]) -> str:
    """What a file holds. Tables come last."""
    lines, tables = [], []
    for name, value in facts.items():
        label = name.replace("_", " ")
        if isinstance(value, list) and value and isinstance(value[0], dict):
            tables.append(f"\n{label}\n{table(value)}")
        else:
            lines.append(f"{label:{NAME_COLUMN}}  {_fact(name, value)}")
    return "\n".join([*lines, *tables])


def text_of_known(models: Mapping[str, Mapping[str, object]]) -> str:
    """The known models, one a row, with the size of a file in 16 bits."""
    return table(
        [{"name": name, **facts, "bf16": _stored(facts)} for name, facts in models.items()]
    )


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Heads and aligned columns; numbers stand on the right."""
    heads = list(rows[0])
    cells = [[_fact(head, row[head]) for head in heads] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    right = [not isinstance(rows[0][head], str | list) or head == "bf16" for head in heads]
    lines = [[head.replace("_", " ") for head in heads], *cells]
    return "\n".join(
        "  ".join(
            f"{cell:>{width}}" if number else f"{cell:{width}}"
            for cell, width, number in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _stored(facts: Mapping[str, object]) -> str:
    parameters = facts["parameters"]
    assert isinstance(parameters, int)
    return bytes_text(parameters * STORED_BYTES)


def _fact(name: str, value: object) -> str:
    match name, value:
        case _, None:
            return UNKNOWN
        case "parameters", int():
            return count_text(value)
        case "bytes", int():
            return bytes_text(value)
        case _, float():
            return f"{value:.3g}"
        case _, list():
            words = list(map(str, value))
            return (", " if any(" " in word for word in words) else " ").join(words) or "none"
    return str(value)
