"""What all nodes share: what comes in is checked before anything is done, and a file that was
replaced is read anew."""

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
    """A node gives its `define_schema` and what it does, as `perform`.

    FILES: inputs that name files -> the file or folder of a value (None: none; ValueError: what is
    not in the list). LOOKED_UP: further choices that the node looks up itself, and says more about
    than that they are not in the list.
    """

    FILES: ClassVar[dict[str, Callable[[str], Path | None]]] = {}
    LOOKED_UP: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def execute(cls, **given) -> io.NodeOutput:
        check_inputs(cls.define_schema(), given, {*cls.FILES, *cls.LOOKED_UP})
        return cls.perform(**given)

    @classmethod
    def perform(cls, **given) -> io.NodeOutput:
        raise NotImplementedError

    @classmethod
    def fingerprint_inputs(cls, **given) -> str:
        """The host calls this before it takes an earlier result: another one when a file was
        replaced. What comes by a link is None here; the node at its other end has a fingerprint of
        its own."""
        named = [
            (find, given[name])
            for name, find in cls.FILES.items()
            if isinstance(given.get(name), str)
        ]
        return fingerprint(path for find, name in named if (path := _found(find, name)) is not None)


def _found(find: Callable[[str], Path | None], name: str) -> Path | None:
    try:
        return find(name)
    except (ValueError, OSError):  # the node itself says so when it is executed
        return None


def fingerprint(paths: Iterator[Path]) -> str:
    """Of where these files, and those in these folders, really are, of when each changed last, and
    of their sizes."""
    rows = [(str(file), stat_of(file)) for path in paths for file in _files(path)]
    return hashlib.sha256(repr(rows).encode(errors="surrogateescape")).hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    """Where links lead; a model's transformer may be one, which a search below its folder does not
    follow."""
    if not path.is_dir():
        return [path.resolve()]
    found = {*path.rglob("*"), *transformer_folder(path).glob("*")}
    return sorted({guarded(file, None, file.resolve, file) for file in found})
