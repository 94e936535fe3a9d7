"""TOML files. What is wrong with one is said in one line that names the file."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

from ..system.json_text import MOST_DEPTH, json_text
from ..system.texts import check_line_ends, lines_of, read_text
from .base_settings import PATHS_OF_WINDOWS

MOST_BYTES = 1_000_000
NESTED = f"nested more than {MOST_DEPTH} deep; write [stage] and its settings below it"
PART = r"""(?:[\w-]{1,80}|"[^"\n]{0,80}"|'[^'\n]{0,80}')[ \t]*\.[ \t]*"""
LONG_KEY = re.compile(f"(?:{PART}){{{MOST_DEPTH}}}")
"""a.a.a...: the library's time grows with the square of its parts"""


def read_tables(path: Path) -> dict:
    """The tables by name. Raises ValueError naming the file, and the line if there is one."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a TOML file")
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    text = read_text(path, MOST_BYTES)
    check_line_ends(text, path)
    for number, line in enumerate(lines_of(text), start=1):
        if LONG_KEY.search(line):
            raise ValueError(f"{path}: line {number:,} is {NESTED}")
    try:
        return toml.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is {NESTED}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {_said(error)}{_hint(text, str(error))}") from None


def _said(error: ValueError) -> str:
    """Python's own line about a number of thousands of digits gives advice for programmers."""
    return "a number has too many digits" if "(4300 digits)" in str(error) else str(error)


def _hint(text: str, error: str) -> str:
    """Advice if the mistake is in a line with a backslash in double quotes, where it begins an escape:
    probably a Windows path."""
    number = re.search(r"at line (\d+)", error)
    line = text.split("\n")[int(number[1]) - 1] if number else ""
    return f"; {PATHS_OF_WINDOWS}" if re.search(r'"[^"]*\\', line) else ""


def toml_text(tables: dict[str, dict[str, str | bool | int | float]]) -> str:
    """Tables of plain values as a TOML file. A text is written as JSON writes it, which TOML reads too."""
    parts = []
    for name, table in tables.items():
        lines = [f"{key} = {_toml_value(value)}" for key, value in table.items()]
        parts.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(parts) + "\n"


def _toml_value(value: str | bool | int | float) -> str:
    return repr(value) if type(value) in (int, float) else json_text(value, ensure_ascii=False)
