"""Figures of this machine that are slow to measure, kept between runs in the user's cache folder.

Nothing depends on them being there: a file that cannot be read is measured anew, one that cannot be
written is left out.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .atomic import read_object, write_json

FOLDER = "PPCL_CACHE"  # of the environment: another folder
KEPT = 7 * 24 * 3600.0  # seconds; a machine that was busy when it was measured is measured again
MOST = 64  # figures in a file


def cache_folder() -> Path:
    """Where this operating system keeps what programs can make again."""
    if given := os.environ.get(FOLDER):
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ppcl"


def remembered(name: str, measure: Callable[[], float]) -> float:
    """The figure of this name: a positive number, measured a week ago at most."""
    path, now = cache_folder() / "machine.json", time.time()
    known = _read(path)
    match known.get(name):
        case {"value": float(value), "at": float(at)} if value > 0 and 0 <= now - at < KEPT:
            return value
    value = measure()
    newest = list(known.items())[-MOST + 1 :]
    if math.isfinite(value):
        _write(path, {**dict(newest), name: {"value": value, "at": now}})
    return value


def _read(path: Path) -> dict:
    try:
        return read_object(path) if path.exists() else {}
    except (ValueError, OSError):  # damaged, or another user's
        return {}


def _write(path: Path, figures: dict) -> None:
    # ignored: a folder that cannot be written, and something else of this name
    with suppress(ValueError, OSError):
        write_json(path, figures)
