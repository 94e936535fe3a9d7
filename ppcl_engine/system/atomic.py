"""Files that appear whole or not at all. Standard library only, so that reading a job's state is
cheap."""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .json_text import NotJSON, json_text, parse_json
from .outputs import check_file
from .regular_files import check_regular

WINDOWS_TRIES, WINDOWS_WAIT = 40, 0.05  # seconds
ENDING = ".partial"
WRITER = re.compile(r"\.(?:([0-9a-f]{8})-)?([0-9]{1,10})(?:-[0-9a-f]{8})?\.partial")
"""after the file's name: machine, process, and a token that tells two writers of one process
apart"""
# seconds without a byte written, after which nobody is assumed to be writing a file
FORGOTTEN = 24 * 3600.0
# bytes; the index of a model of thousands of tensors has a few hundred thousand
LARGEST_JSON = 256_000_000


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, used by this call alone; on success it replaces
    `path`, on failure it is removed.

    Leftovers of killed processes beside `path` are removed too; files that a running process writes
    stay. Raises ValueError where `path` is something other than a file, such as a device.
    """
    path = Path(path)
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{ENDING}"):
        if _is_left_over(left, path.name):
            left.unlink(missing_ok=True)
    temporary = path.with_name(
        f".{path.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{ENDING}"
    )
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


def _is_left_over(partial: Path, name: str) -> bool:
    """Whether its process ran on this machine and has ended, or its writer is unknown and it has
    not changed for a day."""
    match = WRITER.fullmatch(partial.name.removeprefix(f".{name}"))
    if match and match[1] in (None, _machine()):
        import psutil  # os.kill(pid, 0) would end the process on Windows

        if not psutil.pid_exists(int(match[2])):
            return True
    try:
        return time.time() - partial.stat().st_mtime > FORGOTTEN
    except FileNotFoundError:  # its writer has just put it in place
        return False


def _machine() -> str:
    """Folders may be shared between machines, whose process numbers overlap."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _replace(temporary: Path, path: Path) -> None:
    """Windows refuses while somebody reads `path`, such as a page that shows a job's state, or a
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
    """Raises ValueError naming the file when it is not a file, is not JSON, or holds JSON that no
    file should."""
    if check_regular(path).st_size > LARGEST_JSON:
        raise ValueError(
            f"{path} is not a JSON file (more than {LARGEST_JSON:,} bytes); remove it or restore it"
        )
    try:
        return parse_json(Path(path).read_bytes().decode("utf-8-sig"))
    except (NotJSON, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}); remove it or restore it") from None


def read_object(path: Path) -> dict:
    """The same for a file that holds a JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} is not a JSON object but {type(value).__name__}; remove it or restore it"
        )
    return value
