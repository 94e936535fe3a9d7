"""Text files as people save them: UTF-8, with or without a byte order mark. Standard library
only."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

MOST_BYTES = 100_000_000
MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
SAVE = "save it as UTF-8"


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text, with its line ends. Raises ValueError naming the file and the first byte that is
    not UTF-8."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a text file")
    if path.stat().st_size > most:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, too many for a text; give another file"
        )
    content = path.read_bytes()
    if mark := MARKS.get(content[:2]):
        raise ValueError(f"{path} is {mark} (its first bytes are {content[:2].hex(' ')}); {SAVE}")
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text = content[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: {_place(content, start + error.start)}; {SAVE}"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"{path} is UTF-16 or not text: {_place(content, content.index(0))}; {SAVE}"
        )
    return text


def check_line_ends(text: str, path: Path) -> None:
    """Raises ValueError for line ends of old Macs, which would make one line of several."""
    if found := re.search(r"\r(?!\n|$)", text):
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(
            f"{path}: line {line:,} has a carriage return in it; save it with line feeds (LF or CRLF)"
        )


def lines_of(text: str) -> list[str]:
    """Split at line feeds only; form feeds, U+2028 and the like stay inside their lines. A line
    feed at the end does not start another line."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _place(content: bytes, byte: int) -> str:
    line = content.count(b"\n", 0, byte) + 1
    return f"byte {byte:,} (line {line:,}) is 0x{content[byte]:02x}"
