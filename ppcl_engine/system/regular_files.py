"""What a path leads to before it is opened: a pipe would never answer, and a device is not a file
of anybody's."""

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
"""device, inode, size, time of the last change in nanoseconds: what two looks at one file have in
common"""


def check_regular(path: Path) -> os.stat_result:
    """Raises ValueError for what is neither a file nor a link to one; FileNotFoundError where there
    is nothing."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
        raise ValueError(f"{path} is {kind}; give a regular file")
    return status


def identity_of(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
