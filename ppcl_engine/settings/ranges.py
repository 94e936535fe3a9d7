"""The values that a setting allows, as part of its field's type, where the command line, the nodes and
run files all read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, get_type_hints

from ..system.wording import DEVICE_FORM, DEVICES, shown

MOST = 1_000_000


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, both included, without NaN and infinity; whole numbers if both
    bounds are ints."""

    least: float
    most: float

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        kind = "whole number" if isinstance(self.least, int) else "number"
        return f"a {kind} from {_figure(self.least)} to {_figure(self.most)}"


@dataclass(frozen=True)
class TextForm:
    """Text of a certain form."""

    form: str
    """regular expression that the whole text matches"""
    wanted: str
    """the same in words, for messages"""

    def holds(self, value: str) -> bool:
        return re.fullmatch(self.form, value) is not None

    def __str__(self) -> str:
        return self.wanted


class OutOfRange(ValueError):
    """A setting does not allow this value."""

    def __init__(self, name: str, value: object, wanted: Range | TextForm):
        super().__init__(f"--{name.replace('_', '-')} {shown(value)}: choose {wanted}")
        self.name, self.value, self.wanted = name, value, wanted


_FILE_NAME = "letters, digits, '-' and '_' only, at most 80 of them"
Device = Annotated[str, TextForm(DEVICE_FORM, DEVICES)]
FileName = Annotated[str, TextForm(r"[A-Za-z0-9_-]{1,80}", _FILE_NAME)]
FileNameOrEmpty = Annotated[str, TextForm(r"[A-Za-z0-9_-]{0,80}", _FILE_NAME)]
Seed = Annotated[int, Range(0, 2**31 - 1)]
"""multiplied by a million, it is still a valid seed of torch"""
Count = Annotated[int, Range(1, MOST)]
CountOrZero = Annotated[int, Range(0, MOST)]
Samples = Annotated[int, Range(2, MOST)]
Pixels = Annotated[int, Range(0, 16_384)]
Steps = Annotated[int, Range(1, 1000)]
Share = Annotated[float, Range(0.0, 1.0)]
Rate = Annotated[float, Range(0.0, 1.0)]
"""a learning rate or weight decay; at most 1, so that no update changes a weight by more than 1"""
Guidance = Annotated[float, Range(0.0, 100.0)]
Gigabytes = Annotated[float, Range(1e-6, 1e6)]
GigabytesOrZero = Annotated[float, Range(0.0, 1e6)]
Limit = Annotated[float, Range(0.0, 1e6)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a stage. Raises OutOfRange (a ValueError) for a value that a field does not
    allow."""

    def __post_init__(self):
        for name, rule in rules_of(type(self)).items():
            value = getattr(self, name)
            if value is not None and not rule.holds(value):
                raise OutOfRange(name, value, rule)
        for name, value in vars(self).items():
            if isinstance(value, Path) and not _is_text(str(value)):
                raise ValueError(
                    f"--{name.replace('_', '-')} {str(value)!r} is not UTF-8, as reports are written; rename the folder"
                )


@lru_cache(maxsize=64)
def rules_of(kind: type) -> Mapping[str, Range | TextForm]:
    """Field -> rule, for the fields that have one."""
    rules = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for part in getattr(hint, "__metadata__", ()):
            if isinstance(part, Range | TextForm):
                rules.setdefault(name, part)
    return MappingProxyType(rules)


def _is_text(path: str) -> bool:
    """Whether the path's bytes were UTF-8: Python keeps others as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in path)


def _figure(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"
