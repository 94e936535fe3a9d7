"""What a benchmark's file says of each prompt, and the reading of its rows. A row that is wrong is
named in one line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ...system.json_text import NotJSON, parse_json
from ...system.texts import lines_of, read_text

MOST_CELL = 1_000_000  # characters; a csv with an open quote would be one cell

Kept = TypeVar("Kept")


@dataclass(frozen=True, kw_only=True)
class Question:
    """Something that a picture of the prompt shows; the answer should be yes."""

    text: str
    parents: tuple[int, ...] = ()
    """places, among the prompt's questions, of those without which this one makes no sense"""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt, and how its picture is judged: by questions, by words to read, or by a text that it
    should fit."""

    name: str
    """the file's own name or number of the prompt"""
    prompt: str
    category: str
    """the score is the mean of its categories'"""
    questions: tuple[Question, ...] = ()
    rule: Literal["share", "all", "product"] = "share"
    """share: of the questions answered with yes; all: 1 if every answer is yes; product: of the
    probabilities of yes"""
    words: str = ""
    """text that stands in the picture"""
    fits: str = ""
    """text that the picture fits"""

    @property
    def is_judged(self) -> bool:
        """Whether there is anything to ask, to read or to compare with."""
        has_words = any(letter.isalnum() for letter in self.words)
        return bool(self.questions or has_words or self.fits.strip())

    @property
    def needs(self) -> str:
        """What a grader must be able to do: "ask", "read" or "similarity"."""
        if self.questions:
            return "ask"
        return "read" if self.words else "similarity"


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(where it stands, the row) of a csv file with a head line. Raises ValueError naming a missing
    column, or a row that is too short."""
    csv.field_size_limit(MOST_CELL)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for column in columns:
            if column not in (reader.fieldnames or ()):
                there = ", ".join(name or "''" for name in reader.fieldnames or ()) or "none"
                raise ValueError(f"{path} has no column {column!r}; it has {there}")
        for row in reader:
            where = f"{path}, line {reader.line_num:,}"
            if absent := [column for column in columns if row[column] is None]:
                raise ValueError(f"{where} has no {absent[0]}; download the file again")
            yield where, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num:,} is not csv ({error})") from None


def json_lines(path: Path, fields: dict[str, type | tuple]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the object) of every line that is not blank. Raises ValueError naming a
    field that is missing or of another kind."""
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number:,}"
        try:
            row = parse_json(line)
        except NotJSON as error:
            raise ValueError(f"{where} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a JSON object")
        for name, kind in fields.items():
            if not isinstance(row.get(name), kind):
                raise ValueError(f"{where} has no {name!r}, or one of another kind")
        yield where, row


def spread(items: Sequence[Kept], most: int) -> list[Kept]:
    """At most `most` of them, evenly over the file, whose prompts stand sorted by category."""
    count = min(most, len(items))
    return [items[number * len(items) // count] for number in range(count)]
