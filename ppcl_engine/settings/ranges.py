"""What a setting may be, said once, in its field's type: the command line, nodes and run files all
read it there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, get_type_hints

from ..system.wording import DEVICE_FORM, DEVICES, shown

MOST = 1_000_000


@dataclass(frozen=True)
class Range:
    """From `least` to `most`, both included; neither NaN nor infinity is. Of whole numbers where
    both are written as such."""

    least: float
    most: float

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        kind = "whole number" if isinstance(self.least, int) else "number"
        return f"a {kind} from {_figure(self.least)} to {_figure(self.most)}"


@dataclass(frozen=True)
class Pattern:
    """Text of this form, which `wanted` says in words."""

    form: str
    wanted: str

    def holds(self, value: str) -> bool:
        return re.fullmatch(self.form, value) is not None

    def __str__(self) -> str:
        return self.wanted


class OutOfRange(ValueError):
    """A setting that may not have this value."""

    def __init__(self, name: str, value: object, wanted: Range | Pattern):
        super().__init__(f"--{name.replace('_', '-')} {shown(value)}: choose {wanted}")
        self.name, self.value, self.wanted = name, value, wanted


_FILE_NAME = "letters, digits, '-' and '_' only, at most 80 of them"
Device = Annotated[str, Pattern(DEVICE_FORM, DEVICES)]
FileName = Annotated[str, Pattern(r"[A-Za-z0-9_-]{1,80}", _FILE_NAME)]
FileNameOrEmpty = Annotated[str, Pattern(r"[A-Za-z0-9_-]{0,80}", _FILE_NAME)]
Seed = Annotated[int, Range(0, 2**31 - 1)]
"""Times a million, a seed still has to be one of torch's."""
Count = Annotated[int, Range(1, MOST)]
CountOrZero = Annotated[int, Range(0, MOST)]
Samples = Annotated[int, Range(2, MOST)]
Pixels = Annotated[int, Range(0, 16_384)]
Steps = Annotated[int, Range(1, 1000)]
Share = Annotated[float, Range(0.0, 1.0)]
Rate = Annotated[float, Range(0.0, 1.0)]
"""Of learning, or of a weight's decay: then no weight grows by more than 1 in an update."""
Guidance = Annotated[float, Range(0.0, 100.0)]
Gigabytes = Annotated[float, Range(1e-6, 1e6)]
Limit = Annotated[float, Range(0.0, 1e6)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a stage. Raises OutOfRange (a ValueError) for a value that its field does not allow."""

    def __post_init__(self):
        for name, rule in rules_of(type(self)).items():
            value = getattr(self, name)
            if value is not None and not rule.holds(value):
                raise OutOfRange(name, value, rule)


@lru_cache(maxsize=64)
def rules_of(kind: type) -> Mapping[str, Range | Pattern]:
    """Field -> what it may be, of those that have a rule."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        rules = [
            part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Range | Pattern)
        ]
        if rules:
            found[name] = rules[0]
    return MappingProxyType(found)


def _figure(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"
