"""What all nodes share: inputs are checked before anything is done, and a node runs again when one of
its files was replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from comfy_api.v0_0_2 import io

from ..ppcl_engine.models.stored_layout import transformer_folder
from .checks import check_inputs
from .listing import guarded, stat_of


class Node(io.ComfyNode):
    """A subclass defines `define_schema`, and what the node does as `perform`."""

    FILES: ClassVar[dict[str, Callable[[str], Path | None]]] = {}
    """input that names a file -> gives the file or folder of a name (None: nothing is chosen); it
    raises ValueError for a name that is not in the list"""
    LOOKED_UP: ClassVar[tuple[str, ...]] = ()
    """further inputs whose choice the node looks up itself, since it can explain more about a wrong
    one"""

    @classmethod
    def execute(cls, **given) -> io.NodeOutput:
        check_inputs(cls.define_schema(), given, {*cls.FILES, *cls.LOOKED_UP})
        return cls.perform(**given)

    @classmethod
    def perform(cls, **given) -> io.NodeOutput:
        raise NotImplementedError

    @classmethod
    def fingerprint_inputs(cls, **given) -> str:
        """The host calls this before it reuses an earlier result; the answer differs once a file was
        replaced. What comes through a link is None here; the node at its other end has its own
        fingerprint."""
        named = [
            (find, given[name])
            for name, find in cls.FILES.items()
            if isinstance(given.get(name), str)
        ]
        return fingerprint(
            path for find, name in named if (path := _path_of(find, name)) is not None
        )


def _path_of(find: Callable[[str], Path | None], name: str) -> Path | None:
    try:
        return find(name)
    except (ValueError, OSError):  # the node itself will say so when it runs
        return None


def fingerprint(paths: Iterator[Path]) -> str:
    """A hash of these files and the files in these folders: real paths, times of change, sizes."""
    rows = [(str(file), stat_of(file)) for path in paths for file in _files(path)]
    return hashlib.sha256(repr(rows).encode(errors="surrogateescape")).hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    """The real files at a path. The transformer's folder is searched by itself, since it may be a
    link, which `rglob` does not follow."""
    if not path.is_dir():
        return [path.resolve()]
    files = {*path.rglob("*"), *transformer_folder(path).glob("*")}
    return sorted({guarded(file, None, file.resolve, file) for file in files})
