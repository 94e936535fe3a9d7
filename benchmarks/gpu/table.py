"""The one table of all parts, in markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .card import GB

HEADER = (
    "part",
    "row",
    "seconds",
    "share of time",
    "share of FLOPs",
    "ratio",
    "peak GB",
    "note",
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the table; None: an empty cell."""

    row: str
    seconds: float | None = None
    time_share: float | None = None
    """of what it is compared with"""
    flop_share: float | None = None
    """of the same"""
    peak: int | None = None
    """bytes on the device"""
    note: str = ""

    @classmethod
    def of(cls, name: str, row: dict, note: str = "", **shares: float | None) -> Line:
        """The line of a measured row, or of one that was cut."""
        if "cut" in row:
            return cls(row=name, note=f"cut: {row['cut']}")
        return cls(row=name, seconds=row["seconds"], peak=row.get("peak"), note=note, **shares)

    @property
    def ratio(self) -> float | None:
        if self.time_share is None or self.flop_share is None:
            return None
        return self.time_share / self.flop_share

    def cells(self) -> list[str]:
        peak = None if self.peak is None else self.peak / GB
        return [
            self.row,
            number(self.seconds, ".4g"),
            *(number(value, ".3f") for value in (self.time_share, self.flop_share, self.ratio)),
            number(peak, ".2f"),
            self.note.replace("|", "/"),
        ]


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(parts: Iterable[tuple[str, list[Line]]]) -> str:
    rows = [[name, *line.cells()] for name, lines in parts for line in lines]
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
