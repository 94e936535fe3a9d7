"""Files that appear whole or not at all. Standard library only, so that reading a job's state costs
nothing."""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .json_text import json_text
from .outputs import check_file

WINDOWS_TRIES, WINDOWS_WAIT = 40, 0.05  # seconds


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it replaces `path`, on failure it goes.

    What a killed process left beside `path` goes too. Raises ValueError for what is no file, such
    as a device.
    """
    path = Path(path)
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _replace(temporary, path)
    except OSError as error:
        # a full disk does not say where it is full
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """Windows refuses for as long as somebody reads `path`: a page that shows a job's state, a
    virus scanner."""
    for _ in range(WINDOWS_TRIES):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if os.name != "nt":
                raise
            time.sleep(WINDOWS_WAIT)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    write_text(path, json_text(value, indent=1) + "\n")


def read_json(path: Path):
    """Raises ValueError naming the file when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # not JSON, not UTF-8, a number or a nesting without end
        raise ValueError(f"{path} is not a JSON file ({error}); remove it or restore it") from None
