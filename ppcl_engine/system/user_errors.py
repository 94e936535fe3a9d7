"""How a command ends that cannot be done: one line on stderr, and its exit code. Standard library
only."""

from __future__ import annotations

import errno
import os
import sys

USER_ERROR = 2
LONGEST_PATH = 259
"""characters, on a Windows that is as it was installed"""
_ADVICE = {
    errno.ENOSPC: "free space; nothing half-written was left",
    errno.EDQUOT: "free space; nothing half-written was left",
    errno.ENAMETOOLONG: "give a shorter path",
}
_OTHER_ADVICE = (
    "give a path that can be read, or a folder that can be written; nothing half-written was left"
)


def line_of(error: BaseException) -> str:
    """What happened and what to do."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped; run the same command to go on"
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{os.strerror(error.errno)}; {_advice(error)}"
    return str(error)


def _advice(error: OSError) -> str:
    """Windows says of a path that is too long that it does not exist."""
    if os.name == "nt" and len(str(error.filename)) > LONGEST_PATH:
        return f"Windows takes paths of {LONGEST_PATH} characters; move the folder up, or turn on long paths"
    return _ADVICE.get(error.errno or 0, _OTHER_ADVICE)


def drop_output() -> None:
    """What was not written yet would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
