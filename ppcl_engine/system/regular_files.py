"""Checks what a path leads to before it is opened: reading a pipe would never return, and a device
is not a file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}

Identity = tuple[int, int, int, int]
"""device, inode, size, time of the last change in nanoseconds: equal as long as a file is unchanged"""


def check_regular(path: Path) -> os.stat_result:
    """Raises ValueError for anything but a file or a link to one; FileNotFoundError where nothing
    exists."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
        raise ValueError(f"{path} is {kind}; give a regular file")
    return status


def identity_of(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
