"""The variants of all bundles that the host lists, from the files' headers. Each is read once."""

from __future__ import annotations

import json
from pathlib import Path

from ...ppcl_engine.models.bundle import PLAN_KEY
from ...ppcl_engine.plan import FULL
from ..listing import Stat, guarded, stat_of
from ..paths import model_files
from .request import SMALLEST

LONGEST_HEADER = 20_000_000  # bytes; the largest models have about one million
LONGEST_NAME = 200  # characters
ENDING = ".safetensors"
LENGTH = 8  # bytes that say how long the header is
OF_HEADER = PLAN_KEY.encode()

_read: dict[Path, tuple[Stat, tuple[str, ...]]] = {}


def variant_names() -> list[str]:
    """Choices for a combo: the variants of all bundles that the host lists. A node checks that its
    own bundle has the chosen one. A damaged file adds none; what is wrong with it is said when it is
    loaded."""
    names = {SMALLEST: None, FULL: None}
    paths = [path for path in model_files().values() if path.suffix == ENDING]
    seen = {path: stat for path in paths if (stat := stat_of(path)) is not None}
    for path, stat in seen.items():
        names |= dict.fromkeys(_variants_in(path, stat))
    for path in _read.keys() - seen.keys():
        del _read[path]
    return list(names)


def _variants_in(path: Path, stat: Stat) -> tuple[str, ...]:
    if _read.get(path, (None,))[0] != stat:
        _read[path] = (
            stat,
            guarded(path, stat, lambda: _variants(path, stat[1]), (), "shows none of its variants"),
        )
    return _read[path][1]


def _variants(path: Path, size: int) -> tuple[str, ...]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        if length > size - LENGTH:
            raise ValueError(
                "it is not a safetensors file, or not complete; copy or download it again"
            )
        if length > LONGEST_HEADER:
            raise ValueError(
                f"its header has {length:,} bytes; a model's has less than {LONGEST_HEADER:,}"
            )
        header = file.read(length)
    if OF_HEADER not in header:
        return ()
    metadata = json.loads(header).get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(PLAN_KEY), str):
        raise ValueError("its plan is not a text in the metadata; export it again")
    return _names(json.loads(metadata[PLAN_KEY]))


def _names(plan: object) -> tuple[str, ...]:
    """Names of the variants in a plan, which itself is only checked when the bundle is loaded."""
    match plan:
        case {"variants": [*rows]}:
            names = [row.get("name") for row in rows if isinstance(row, dict)]
            if len(names) == len(rows) and all(
                isinstance(name, str) and len(name) <= LONGEST_NAME for name in names
            ):
                return tuple(names)
    raise ValueError("its plan names no variants; export it again")
