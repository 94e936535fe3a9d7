"""What `--help` prints: all stages, grouped as their folders are, or the settings of one. Without
tyro, whose pages keep the order of the classes that settings inherit from."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from .assess_settings import RunConfig
from .help_texts import setting_help
from .ranges import Settings

HELP = {"-h", "--help"}
WIDEST = 100  # columns of a page, however wide the terminal
STAGE_COLUMN, TEXT_COLUMN = 16, 8
RUNNING = (
    "device",
    "dtype",
    "streamed",
    "parallel",
    "seed",
    "target_tokens_only",
    "quant_aware",
    "dry_run",
)
"""settings of how a stage runs, whatever it does; in this order, at a page's end"""
TYPES = {Path: "PATH", str: "TEXT", int: "INT", float: "FLOAT"}


def overview(rooms: Mapping[str, str], stages: Mapping[str, Mapping[str, type]]) -> str:
    """`rooms`: folder -> what its stages do; `stages`: folder -> stage -> settings."""
    parts = ["usage: ppcl STAGE [settings]; ppcl STAGE --help lists them"]
    for room, title in rooms.items():
        lines = [_stage_line(stage, kind) for stage, kind in stages[room].items()]
        parts.append("\n".join([f"{room}: {title}", *lines]))
    return "\n\n".join(parts)


def _stage_line(stage: str, kind: type) -> str:
    return textwrap.fill(
        _summary(kind),
        _columns(),
        initial_indent=f"  {stage:{STAGE_COLUMN - 2}}",
        subsequent_indent=" " * STAGE_COLUMN,
    )


def page(stage: str, kind: type[Settings]) -> str:
    """The settings of a stage: those it needs, its own, and how it runs."""
    needed = [f for f in fields(kind) if f.default is MISSING]
    running = [f for name in RUNNING for f in fields(kind) if f.name == name]
    own = [f for f in _own_first(kind) if f not in needed and f not in running]
    usage = " ".join(["usage: ppcl", stage, *(_call(kind, f) for f in needed), "[settings]"])
    parts = [usage, textwrap.fill(_summary(kind), _columns())]
    groups = {"needed": needed, "settings": own, "how it runs": running}
    parts += [
        "\n".join([f"{title}:", *(_setting(kind, f) for f in group)])
        for title, group in groups.items()
        if group
    ]
    return "\n\n".join(parts)


def _own_first(kind: type[Settings]) -> Iterable[Field]:
    """A stage's own settings come before those that it shares with others."""
    own = vars(kind).get("__annotations__", {})
    return sorted(fields(kind), key=lambda field: field.name not in own)


def _summary(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split())


def _setting(kind: type[Settings], field: Field) -> str:
    declaring = next(c for c in kind.__mro__ if field.name in vars(c).get("__annotations__", {}))
    text = f"{setting_help(declaring, field.name)}{_default(field)}"
    indent = " " * TEXT_COLUMN
    return f"  {_call(kind, field)}\n" + textwrap.fill(
        text, _columns(), initial_indent=indent, subsequent_indent=indent
    )


def _call(kind: type[Settings], field: Field) -> str:
    """The setting as it is written: "--seed INT"."""
    if kind is RunConfig and field.default is MISSING:
        return field.name.upper()
    name, hint = field.name.replace("_", "-"), get_type_hints(kind)[field.name]
    if hint is bool:
        return f"--{name}, --no-{name}"
    if get_origin(hint) is Literal:
        return f"--{name} {{{','.join(map(str, get_args(hint)))}}}"
    types = [TYPES[t] for t in get_args(hint) or (hint,) if t in TYPES]
    return f"--{name} {types[0]}"


def _default(field: Field) -> str:
    if field.default is MISSING or field.default is None or field.default == "":
        return ""
    value = field.default
    if isinstance(value, bool):
        value = "on" if value else "off"
    return f" (default: {value})"


def _columns() -> int:
    return min(WIDEST, shutil.get_terminal_size().columns)
