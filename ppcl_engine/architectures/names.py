"""Tables between diffusers' tensor names and ComfyUI's, complete in both directions; `{}` stands
for a block's number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from .base import Part

# the first word or two are followed by the block's number
NUMBERED = re.compile(r"((?:\w+\.)?\w+)\.([0-9]{1,9})\.(.+)")
LINEAR = {"weight": "weight", "bias": "bias"}

Modules = Mapping[str, str | tuple[str, tuple[int, ...], int]]
"""diffusers' module -> ComfyUI's, or (ComfyUI's, pieces, of) where one of ComfyUI's tensors holds
several of diffusers'"""


def tensors_of(
    modules: Modules, ours: str = "", theirs: str = "", leaves: Mapping[str, str] = LINEAR
):
    """Name of a tensor -> Part.

    `ours`, `theirs`: prefixes; `leaves`: a module's tensors in diffusers -> in ComfyUI.
    """
    table: dict[str, Part] = {}
    for module, place in modules.items():
        whole = Part(place) if isinstance(place, str) else Part(*place)
        for leaf, stored in leaves.items():
            name = f"{theirs}{whole.name}.{stored}"
            table[f"{ours}{module}.{leaf}"] = replace(whole, name=name)
    return table


class NameTable:
    """The rows of several `tensors_of`.

    spellings: endings of ComfyUI's names as some programs write them -> as the rows have them; a
    name that is in no row is looked up with the other ending.
    """

    def __init__(self, *tables: Mapping[str, Part], spellings: Mapping[str, str] | None = None):
        self._parts = {key: part for table in tables for key, part in table.items()}
        self._contents: dict[str, list[str]] = {}
        for key, part in self._parts.items():
            self._contents.setdefault(part.name, []).append(key)
        for other, own in (spellings or {}).items():
            for name in [name for name in self._contents if name.endswith(f".{own}")]:
                self._contents.setdefault(f"{name.removesuffix(own)}{other}", self._contents[name])

    def place(self, key: str) -> Part:
        """Where diffusers' tensor lies in ComfyUI's layout. Raises KeyError for a name that is in
        no row."""
        template, number = (key, "") if key in self._parts else _split(key)
        part = self._parts[template]
        return replace(part, name=part.name.format(number))

    def contents(self, name: str) -> tuple[str, ...]:
        """diffusers' names of what ComfyUI's tensor holds; a name that is in no row comes back
        unchanged."""
        template, number = (name, "") if name in self._contents else _split(name)
        return tuple(key.format(number) for key in self._contents.get(template, [])) or (name,)


def _split(name: str) -> tuple[str, str]:
    match = NUMBERED.fullmatch(name)
    return (f"{match[1]}.{{}}.{match[3]}", match[2]) if match else (name, "")


def depth(keys: Iterable[str], prefix: str) -> int:
    """How many blocks a model has whose names begin with `prefix` and the block's number."""
    return 1 + max(
        int(key.removeprefix(prefix).split(".")[0]) for key in keys if key.startswith(prefix)
    )
