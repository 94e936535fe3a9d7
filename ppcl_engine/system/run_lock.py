"""Only one process at a time works in a run folder.

The operating system keeps the lock, so the lock ends with its process, however that ends.
`holder.json` beside it only says who holds it, for the message to those who wait.
"""

from __future__ import annotations

import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from .atomic import read_object, write_json

LOCK, HOLDER = "worker.lock", "holder.json"
_HELD: dict[str, int] = {}
"""folder -> how many times this process holds its lock"""


@contextmanager
def holding(folder: Path, doing: str) -> Iterator[None]:
    """Holds the folder's lock for a stage; does nothing where this process holds it already, as a
    job's worker does.

    Raises ValueError when another process holds it.
    """
    if _key(folder) in _HELD:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with locked(folder, doing):
        yield


@contextmanager
def locked(folder: Path, doing: str = "", seconds: float = 0.0) -> Iterator[None]:
    """Holds the lock itself. `doing`: what others are told; empty: nothing.

    Raises ValueError, naming the holder, when another process (or another part of this one) keeps
    it for `seconds`; and where something else than a file has the lock's name.
    """
    folder = Path(folder)
    _check_file(folder / LOCK)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise ValueError(
            f"{_holder(folder)} is at work on {folder}; wait for it, or stop it"
        ) from None
    key = _key(folder)
    _HELD[key] = _HELD.get(key, 0) + 1
    try:
        if doing:
            write_json(folder / HOLDER, _about(doing))
        yield
    finally:
        if doing:
            (folder / HOLDER).unlink(missing_ok=True)
        _HELD[key] -= 1
        if not _HELD[key]:
            del _HELD[key]
        lock.release()


def _check_file(path: Path) -> None:
    """A link would lock, and empty, a file that somebody keeps elsewhere."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError(f"{path} is not a file but a folder, link or pipe; remove it")


def _key(folder: Path) -> str:
    return os.path.realpath(folder)


def _about(doing: str) -> dict:
    process = psutil.Process()
    return {
        "pid": process.pid,
        "host": platform.node(),
        "doing": doing,
        "since": time.time(),
        "process_started": process.create_time(),
    }


def _holder(folder: Path) -> str:
    """ "polish (process 123 on host, since 2026-11-28 10:00:00)"; just "another process" where the
    one that wrote it has ended, since the lock then belongs to somebody else."""
    try:
        match read_object(folder / HOLDER):
            case {
                "pid": int(pid),
                "host": str(host),
                "doing": str(doing),
                "since": float(since),
                "process_started": float(started),
            }:
                if host != platform.node() or _is_alive(pid, started):
                    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
                    return f"{doing[:80]} (process {pid} on {host[:80]}, since {when})"
    except (
        ValueError,
        OSError,
        OverflowError,
    ):  # missing, half written, or damaged: it is only information
        pass
    return "another process"


def _is_alive(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 2.0
    except psutil.NoSuchProcess:
        return False
