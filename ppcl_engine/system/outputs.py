"""What a path given for writing may be: looked at before the work whose result goes there. Standard
library only."""

from __future__ import annotations

import os
from pathlib import Path

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
LONGEST_JPEG = 65_500  # pixels a side, as its encoder has it


def check_file(path: Path) -> None:
    """Raises ValueError unless it is a file, or nothing yet. A device or pipe would be replaced,
    not written to."""
    if not path.name or path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a device or a pipe, not a file; give another path")


def check_folder(path: Path) -> None:
    """Raises ValueError unless it is a folder that can be written, or can be made."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is not a folder; give another path")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"{path} cannot be made, since {there} is not a folder; give another path")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{there} cannot be written; give another path")


def check_picture(path: Path) -> str:
    """The format that its ending names. Raises ValueError for another ending and for a place that
    takes no file."""
    check_file(path)
    check_folder(path.parent)
    if path.suffix.lower() not in PICTURES:
        raise ValueError(
            f"{path} is not the name of a picture; let it end in {', '.join(PICTURES)}"
        )
    return PICTURES[path.suffix.lower()]
