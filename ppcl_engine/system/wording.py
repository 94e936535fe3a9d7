"""How wrong input is shown in an error line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

DEVICE_FORM, DEVICES = r"auto|cpu|cuda(:[0-9]{1,3})?", "auto, cpu, cuda or cuda:1"
MOST_SHOWN = 80  # characters of a given value
QUOTED = re.compile(rf"(?<![^\s(\[=:{{])(['\"])(?![\s,;:.)])((?:(?!\1).){{{MOST_SHOWN + 1},}})\1")
"""A quoted text that is too long. A quote opens after a space or the like, and could also close
there, so the text between two quoted words is not taken for one."""
WORD = re.compile(rf"[^\s'\"]{{{MOST_SHOWN + 1},}}")


def shown(value: object) -> str:
    """As it would be typed, cut to MOST_SHOWN characters."""
    return cut(repr(value) if isinstance(value, str) else str(value))


def cut(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 1] + "…"


def known_names(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'longest'? known: ..." for a name that is not known."""
    known = list(known)
    near = difflib.get_close_matches(name[:MOST_SHOWN], known, 1)
    return f"{f'did you mean {near[0]!r}? ' if near else ''}known: {', '.join(known)}"


def one_line(text: str, given: Iterable[str] = ()) -> str:
    """Without line breaks and control characters. Given values and other long words are cut to 80
    characters; a path whose folder exists stays whole."""
    for word in sorted(given, key=len, reverse=True):
        if len(word) > MOST_SHOWN and not _is_place(word):
            text = text.replace(word, cut(word))
    text = " ".join(text.split())
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )
    text = QUOTED.sub(lambda match: f"{match[1]}{_shortened(match[2])}{match[1]}", text)
    return WORD.sub(lambda match: _shortened(match[0]), text)


def _shortened(word: str) -> str:
    return word if _is_place(word.strip('":;,')) else cut(word)


def _is_place(word: str) -> bool:
    try:
        return Path(word).parent != Path() and Path(word).parent.exists()
    except (OSError, ValueError):  # too long for the system, or containing a NUL
        return False
