"""A stage's settings from the command line. tyro parses them; a mistake is reported in one line."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

from ..system.wording import known_names, shown
from .assess_settings import RunConfig
from .ranges import Settings

OUTPUT = "--output"  # the one setting that names a file to write
RULE = re.compile(r"\W*")  # a line of tyro's box that has no word in it
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
EDGES = " \t│|"
# tyro names a class there when it has no setting to name
ORIGIN = re.compile(r"Error parsing (?:[A-Z]\w*: )?")

Kind = TypeVar("Kind", bound=Settings)


def parse(kind: type[Kind], stage: str, arguments: Sequence[str]) -> Kind:
    """The settings of a stage. Raises ValueError naming what is unknown, missing or wrong."""
    command, positional = f"ppcl {stage}", kind is RunConfig
    _check_names(kind, stage, arguments, positional)
    import tyro  # not before the mistakes that are found without it

    printed = io.StringIO()
    # a setting of several values is given several times
    config = (tyro.conf.UseAppendAction, tyro.conf.PositionalRequiredArgs)[: 1 + positional]
    try:
        with redirect_stderr(printed), _endless_lines():
            return tyro.cli(kind, args=arguments, prog=command, config=config)
    except SystemExit as end:
        if not end.code:
            raise
    raise ValueError(f"{_message_in(printed.getvalue())}; {command} --help lists the settings")


def _check_names(
    kind: type[Settings], stage: str, arguments: Sequence[str], positional: bool
) -> None:
    """Refuses unknown and missing settings, which tyro would report with their whole help texts, and
    empty paths, which Path would read as the current folder."""
    names = {f.name.replace("_", "-"): f for f in fields(kind)}
    known = names.keys() | {
        f"no-{name}" for name, field in names.items() if isinstance(field.default, bool)
    }
    given = [
        word[2:].partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")
    ]
    for name in given:
        if name not in known:
            line = known_names(f"--{name}", [f"--{setting}" for setting in sorted(names)])
            raise ValueError(f"{stage} has no setting {shown(f'--{name}')}; {line}")
    paths = {
        f"--{name}"
        for name, hint in get_type_hints(kind).items()
        if Path in (hint, *get_args(hint))
    }
    for number, word in enumerate(arguments):
        name, _, value = word.partition("=")
        value = value or "".join(arguments[number + 1 : number + 2])
        if name == OUTPUT and value.endswith(("/", os.sep)):  # Path would drop it
            raise ValueError(f"{OUTPUT} {shown(value)} is a folder; give the name of a file in it")
        if (
            word in paths
            and arguments[number + 1 : number + 2] == [""]
            or word.endswith("=")
            and word[:-1] in paths
        ):
            raise ValueError(f"{word.rstrip('=')} is empty; give a path")
    if positional and all(word.startswith("-") for word in arguments):
        raise ValueError(f"{stage} needs a file; write ppcl {stage} FILE")
    missing = [
        f"--{name}"
        for name, field in names.items()
        if field.default is MISSING and name not in given
    ]
    if missing and not positional:
        raise ValueError(
            f"{stage} needs {' and '.join(missing)}; ppcl {stage} --help lists the settings"
        )


@contextmanager
def _endless_lines() -> Iterator[None]:
    """Keeps tyro from breaking lines, and words, at the terminal's width."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _message_in(box: str) -> str:
    """The part of tyro's box that says what is wrong: it stands between the title and the help
    texts."""
    part: list[str] = []
    for line in (line.strip(EDGES) for line in COLOUR.sub("", box).splitlines()[1:]):
        if not RULE.fullmatch(line):
            part.append(line)
        elif part:
            break
    return ORIGIN.sub("", " ".join(part)).rstrip(".")
