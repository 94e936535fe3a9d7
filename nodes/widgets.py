"""Widgets made from the fields of a settings class. Type, default and tooltip are the same as on the
command line: this is where a widget's tooltip comes from."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import fields
from types import NoneType, UnionType
from typing import Literal, get_args, get_origin

from comfy_api.v0_0_2 import io

from ..ppcl_engine.settings.base_settings import hints_of
from ..ppcl_engine.settings.convert_settings import ExportConfig
from ..ppcl_engine.settings.help_texts import setting_help
from ..ppcl_engine.settings.ranges import rules_of
from .checks import MOST_CHARACTERS

FILE_NAME = rules_of(ExportConfig)["name"]
WIDGETS = (io.Int.Input, io.Float.Input, io.Boolean.Input, io.String.Input, io.Combo.Input)
WHOLE_SEED = {"control_after_generate": False}
"""without it the page would change the seed after each run"""


def inputs(kind: type, names: str, **changes: dict) -> list[io.Input]:
    """Widgets for these fields of a settings class, in this order, from the least to the most that
    the settings allow. changes: name -> what differs from the settings (default, step, multiline,
    tooltip)."""
    return [_input(kind, name, **changes.get(name, {})) for name in names.split()]


def _input(kind: type, name: str, **changes) -> io.Input:
    hint = _plain(hints_of(kind)[name])
    words = {} if "tooltip" in changes else {"tooltip": help_of(kind, name)}
    given = {"default": defaults(kind)[name], **words, **changes}
    if get_origin(hint) is Literal:
        return io.Combo.Input(name, options=list(get_args(hint)), **given)
    if hint in _NUMBERS:
        allowed = rules_of(kind)[name]
        bounds = {"min": hint(allowed.least), "max": hint(allowed.most)}
        return _NUMBERS[hint](name, **{**bounds, **_step(hint, given["default"]), **given})
    return {bool: io.Boolean, str: io.String}[hint].Input(name, **given)


def with_advanced(rows: list[io.Input], first: Collection[str]) -> list[io.Input]:
    """The same inputs, in the same order; all widgets but `first` are marked as advanced where the host
    knows that mark, and its page then folds them away."""
    for row in rows:
        if isinstance(row, WIDGETS) and hasattr(row, "advanced"):
            row.advanced = row.id not in first or None
    return rows


def _plain(hint):
    """The type of an optional setting when it is given. Its widget needs a default in `changes`."""
    return (
        next(of for of in get_args(hint) if of is not NoneType)
        if isinstance(hint, UnionType)
        else hint
    )


def help_of(kind: type, name: str) -> str:
    """The help text of a setting, which may be a field of a base class."""
    owner = next(base for base in kind.__mro__ if name in vars(base).get("__annotations__", {}))
    return setting_help(owner, name)


_NUMBERS = {int: io.Int.Input, float: io.Float.Input}


def _step(hint: type, default: float) -> dict:
    """A tenth of the default's order of magnitude, so that a learning rate of 0.00001 can be shown
    and changed."""
    if hint is int or not default:
        return {} if hint is int else {"step": 0.01}
    return {"step": 10.0 ** (math.floor(math.log10(default)) - 1)}


def defaults(kind: type) -> dict:
    return {field.name: field.default for field in fields(kind)}


def values(kind: type, given: dict) -> dict:
    """Picks the values that are settings of this class from all of a node's values. Raises
    ValueError for a value that no widget allows: some servers check neither choices nor whether a
    number is finite."""
    hints = hints_of(kind)
    return {
        name: _checked(hints[name], name, value) for name, value in given.items() if name in hints
    }


def _checked(hint, name: str, value):
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ValueError(
            f"{name} {value!r} is not a choice; choose from {', '.join(get_args(hint))}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; give a number")
    if isinstance(value, str):
        check_length(name, value)
    return value


def check_length(name: str, text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name} has {len(text):,} characters; give at most {MOST_CHARACTERS:,}")


def check_file_name(name: str) -> None:
    """Raises ValueError for a name that could be a path, before a job is started with it."""
    if not FILE_NAME.holds(name):
        raise ValueError(f"name {name[:40]!r}: {FILE_NAME}")
