"""Tables of modulation values: made in one streamed pass over the original weights, joined, kept in
small files.

A table holds, for every modulation, its value at each timestep for each number of rows (`batches`)
that it was asked for, as a kernel's last bits depend on that number. Where they do not, one column
serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from ...architectures import Architecture
from ...architectures.folded import TableInputs
from ...architectures.modules import AnyModule
from ...system.json_text import json_text
from ...system.schemas import STRICT, Finite
from ...system.tensor_files import TensorFile, write_tensors
from .basis import Conditionings, values_at

TABLE_KEY = "ppcl_table"

Batches = Sequence[tuple[int, int]]
"""(rows that the time embedder gets, rows of these that a modulation gets) of the forwards that a
table serves"""
Opened = Iterable[tuple[str, Callable[[], nn.Module], Conditionings]]
"""(name, what opens the modulation, what it is given)"""


@dataclass(frozen=True)
class _About:
    """What a table's file says of it."""

    __pydantic_config__ = STRICT

    key: str
    timesteps: tuple[Finite, ...]
    batches: tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...]


@dataclass(frozen=True)
class Table:
    """columns: modulation -> [outputs, timesteps * batches], all timesteps of the first batch
    first."""

    timesteps: tuple[float, ...]
    batches: tuple[int, ...]
    columns: dict[str, torch.Tensor]

    def lacks(self, timesteps: Iterable[float], batches: Iterable[int] = ()) -> bool:
        return not (set(timesteps) <= set(self.timesteps) and set(batches) <= set(self.batches))

    def joined(self, other: Table) -> Table:
        """With the timesteps of `other` behind our own. For a number of rows that one of them has
        no values of its own for, its first ones stand, which differ by rounding at most."""
        new = [place for place, t in enumerate(other.timesteps) if t not in self.timesteps]
        batches = (*self.batches, *(b for b in other.batches if b not in self.batches))
        places, ours = torch.tensor(new, dtype=torch.long), torch.arange(len(self.timesteps))
        columns = {}
        for name, values in self.columns.items():
            parts = [
                (_block(self, values, b, ours), _block(other, other.columns[name], b, places))
                for b in batches
            ]
            columns[name] = torch.cat([half for pair in parts for half in pair], dim=1)
        return Table(
            (*self.timesteps, *(other.timesteps[place] for place in new)), batches, columns
        )

    def only(self, timesteps: Sequence[float]) -> Table:
        """These, which all have to be there, in this order."""
        places = torch.tensor([self.timesteps.index(t) for t in timesteps], dtype=torch.long)
        columns = {
            name: torch.cat([_block(self, values, b, places) for b in self.batches], dim=1)
            for name, values in self.columns.items()
        }
        return Table(tuple(timesteps), self.batches, columns)

    def compact(self) -> Table:
        """Without the values for numbers of rows that give what the first one gives."""
        size = len(self.timesteps)
        blocks = [slice(size * place, size * (place + 1)) for place in range(len(self.batches))]
        kept = [0] + [
            place
            for place, block in enumerate(blocks)
            if place
            and any(not torch.equal(c[:, block], c[:, blocks[0]]) for c in self.columns.values())
        ]
        columns = {
            n: torch.cat([c[:, blocks[place]] for place in kept], dim=1)
            for n, c in self.columns.items()
        }
        return Table(self.timesteps, tuple(self.batches[place] for place in kept), columns)

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for values in self.columns.values())


def _block(table: Table, values: torch.Tensor, batch: int, places: torch.Tensor) -> torch.Tensor:
    first = table.batches.index(batch) if batch in table.batches else 0
    return values.index_select(1, first * len(table.timesteps) + places.to(values.device))


def write_table(path: Path, table: Table, key: str) -> None:
    """key: of the model, precision and device whose values these are."""
    about = {"key": key, "timesteps": table.timesteps, "batches": table.batches}
    write_tensors(path, table.columns, {TABLE_KEY: json_text(about), "format": "pt"})


def read_table(path: Path, key: str) -> Table:
    """Raises ValueError for a file that is not a table, or is another model's."""
    file = TensorFile(path)
    if TABLE_KEY not in file.metadata:
        raise ValueError(f"{path} is not a table of modulations; remove it")
    about = file.about(TABLE_KEY, _About)
    if about.key != key:
        raise ValueError(f"{path} is the table of another model; remove it, and it is made again")
    columns = len(about.timesteps) * len(about.batches)
    for name in file.keys():
        if len(file.shape(name)) != 2 or file.shape(name)[1] != columns:
            raise ValueError(
                f"{path}: {name} {file.shape(name)} does not have {columns} columns; remove the file"
            )
    return Table(about.timesteps, about.batches, file.read_all())


def rows_of(architecture: Architecture, config: dict, samples: Iterable[int]) -> tuple[int, ...]:
    """How many rows modulations get in forwards of so many samples. An edit model's image
    modulations get each sample twice, its reference's timestep behind its own."""
    twice = 1 + len(architecture.reference_timesteps(config))
    return tuple(dict.fromkeys(rows for count in samples for rows in (count, twice * count)))


def batches_of(architecture: Architecture, config: dict, rows: Sequence[int]) -> Batches:
    """The embedder of an edit model gets every sample twice, whatever a modulation gets of it."""
    twice = 1 + len(architecture.reference_timesteps(config))
    return [
        (count if count % twice == 0 and count // twice in rows else twice * count, count)
        for count in rows
    ]


@torch.no_grad()
def conditionings(
    condition: Callable[[torch.Tensor], torch.Tensor], timesteps: Sequence[float], batches: Batches
) -> Conditionings:
    """condition: timesteps [n] in float32 -> conditioning [n, width] by the model's own
    embedder."""
    return {
        rows: torch.stack([condition(torch.full((embedded,), t))[:rows] for t in timesteps])
        for embedded, rows in batches
    }


def make_table(modulations: Opened, timesteps: Sequence[float]) -> Table:
    """One modulation is in memory at a time. At least one timestep."""
    columns, batches = {}, ()
    for name, opened, given in modulations:
        columns[name], batches = values_at(opened(), given).cpu(), tuple(given)
    return Table(tuple(timesteps), batches, columns).compact()


def table_in(maps: dict[str, AnyModule], inputs: TableInputs) -> Table:
    columns = {name: module.weight.detach() for name, module in maps.items()}
    return Table(
        tuple(inputs.timesteps.float().tolist()), next(iter(maps.values())).batches, columns
    )


def put_table(maps: dict[str, AnyModule], inputs: TableInputs, table: Table) -> None:
    inputs.timesteps = torch.tensor(table.timesteps, device=inputs.timesteps.device)
    for name, module in maps.items():
        values = table.columns[name].to(module.weight.device, module.weight.dtype)
        module.weight, module.batches = nn.Parameter(values, requires_grad=False), table.batches
        module.in_features = values.shape[1]
