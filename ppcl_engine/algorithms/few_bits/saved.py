"""Measured damages of formats in a file, so that another budget needs no other measurement."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ...system.atomic import read_json, write_json
from ...system.schemas import STRICT, read_value
from .measuring import Damages

Damage = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class _Row:
    __pydantic_config__ = STRICT

    place: str
    layers: tuple[str, ...]
    damages: dict[str, Damage]
    """store -> damage"""


@dataclass(frozen=True)
class _Saved:
    __pydantic_config__ = STRICT

    settings: str
    rows: tuple[_Row, ...]


class SavedDamages:
    """The damages that were measured with some settings; others lie in other files of the folder."""

    def __init__(self, folder: Path, settings: str):
        name = hashlib.sha256(settings.encode()).hexdigest()[:16]
        self.path, self.settings = folder / f"{name}.json", settings

    def read(self) -> Damages:
        """Empty where nothing was measured with these settings. Raises ValueError naming a damaged
        file."""
        if not self.path.exists():
            return {}
        saved = read_value(_Saved, read_json(self.path), self.path)
        if saved.settings != self.settings:
            return {}
        return {(row.place, row.layers): row.damages for row in saved.rows}

    def write(self, damages: Damages) -> None:
        rows = tuple(_Row(place, layers, found) for (place, layers), found in damages.items())
        write_json(self.path, asdict(_Saved(self.settings, rows)))
