"""Where a loader's tensors are in files, and what the host calls them. Does not call ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ...ppcl_engine.architectures import Part
from ...ppcl_engine.models.layout import Place
from ...ppcl_engine.models.weights import usual_name
from ...ppcl_engine.system.float8 import FP8_MARK
from ...ppcl_engine.system.pickled_files import PickledFile
from ...ppcl_engine.system.tensor_files import TensorFile
from ..host.base import ALL, Cut, Host
from ..host.formats import METADATA, grouped, layers_in
from ..host.quantised import FORMAT, IN_FILE, Quantised, can_be_joined, plain_tensors


@dataclass(frozen=True)
class Stored:
    """Where a tensor is in a file."""

    file: object
    """open, with the methods `shape`, `dtype` and `read` by name"""
    name: str
    """in the file"""
    cut: Cut = Cut()
    """what is read of it"""
    flat: bool = False
    """whether the host has it as one vector"""

    @property
    def shape(self) -> tuple[int, ...]:
        if self.flat:
            return (math.prod(self.file.shape(self.name)),)
        return self.cut.shape(self.file.shape(self.name))

    @property
    def dtype(self) -> torch.dtype:
        return self.file.dtype(self.name)

    def read(self) -> torch.Tensor:
        if self.flat:
            return self.file.read(self.name).flatten()
        # where only first rows are kept, the others need not be read
        kept, of = self.cut.rows
        if self.cut.columns == ALL and kept == tuple(range(len(kept))):
            return (
                self.first_rows(self.file.shape(self.name)[0] // of * len(kept))
                if of > 1
                else self.file.read(self.name)
            )
        return self.cut.of(self.file.read(self.name))

    def first_rows(self, rows: int) -> torch.Tensor:
        if isinstance(self.file, TensorFile):
            return self.file.read(self.name, rows)
        return self.file.read(self.name)[:rows]

    def with_cut(self, cut: Cut) -> Stored:
        assert self.cut == Cut(), "a tensor is cut once"
        return replace(
            self, cut=Cut(cut.rows, cut.columns if len(self.file.shape(self.name)) > 1 else ALL)
        )


@dataclass(frozen=True)
class Joined:
    """One of the host's tensors, whose rows a file stores as several tensors of the same size."""

    pieces: tuple[Stored | Quantised, ...]
    """from the first rows to the last"""

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.pieces[0].shape
        return (first[0] * len(self.pieces), *first[1:])

    def with_cut(self, cut: Cut) -> Joined:
        kept, of = cut.rows
        assert of == len(self.pieces) and cut.columns == ALL, (
            "a joined tensor is only cut between its pieces"
        )
        return Joined(tuple(self.pieces[piece] for piece in kept))

    @property
    def quantised(self) -> list[Quantised]:
        return [piece for piece in self.pieces if isinstance(piece, Quantised)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensor in its format where each row has a scale of its own; else in 16 bits, since the
        pieces' scales are not one's."""
        if len(self.quantised) == len(self.pieces) and can_be_joined(self.quantised):
            pieces = [piece.tensors() for piece in self.quantised]
            rows = {leaf: [piece[leaf] for piece in pieces] for leaf in pieces[0]}
            return {
                leaf: parts[0] if leaf == FORMAT else torch.cat(parts)
                for leaf, parts in rows.items()
            }
        return plain_tensors(
            torch.cat([piece.read() for piece in self.pieces]), self.quantised[0].old
        )


class Reader:
    """Reads each tensor once, and counts bytes. Vectors are kept, since they are needed twice: for a
    fingerprint and then for the model."""

    def __init__(self):
        self.bytes_read, self._vectors = 0, {}

    def tensors(self, name: str, stored: Stored | Joined | Quantised) -> dict[str, torch.Tensor]:
        """The tensors at a location by their names; a quantised matrix is several."""
        if isinstance(stored, Stored) or isinstance(stored, Joined) and not stored.quantised:
            return {name: self.read(stored)}
        tensors = {
            name.removesuffix("weight") + leaf: tensor for leaf, tensor in stored.tensors().items()
        }
        self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    def read_all(
        self, wanted: Mapping[str, Stored | Joined | Quantised]
    ) -> dict[str, torch.Tensor]:
        """All these tensors for the host. The mark of scaled fp8 is left out where the host finds
        the format of each matrix beside it."""
        tensors: dict[str, torch.Tensor] = {}
        for name, location in wanted.items():
            if name != FP8_MARK or not IN_FILE:
                tensors |= self.tensors(name, location)
        return tensors

    def read(self, stored: Stored | Joined) -> torch.Tensor:
        if isinstance(stored, Joined):
            return torch.cat([self.read(piece) for piece in stored.pieces])
        if stored not in self._vectors:
            tensor = stored.read()
            self.bytes_read += tensor.nbytes
            if tensor.ndim != 1:
                return tensor
            self._vectors[stored] = tensor
        return self._vectors[stored]


def locations_in(
    stored: Mapping[str, tuple[object, str]], where: str
) -> dict[str, Stored | Quantised]:
    """Where the tensors of opened files are (as `open_layout` gives them); a quantised matrix and its
    scales are one. What another pack reads is left as that gives it."""
    locations = {name: Stored(file, key) for name, (file, key) in stored.items()}
    if not all(
        isinstance(location.file, TensorFile | PickledFile) for location in locations.values()
    ):
        return locations
    layers = {}
    for metadata in _metadata(stored):
        layers |= layers_in(metadata, where)
    return grouped(locations, where, layers)


def metadata_in(stored: Mapping[str, tuple[object, str]]) -> dict[str, str]:
    """The metadata of these files, without what `locations_in` reads from it."""
    return {
        key: text
        for metadata in _metadata(stored)
        for key, text in metadata.items()
        if key != METADATA
    }


def _metadata(stored: Mapping[str, tuple[object, str]]) -> list[dict[str, str]]:
    files = {id(file): file for file, _ in stored.values()}
    return [getattr(file, "metadata", {}) for file in files.values()]


def in_host_names(
    host: Host,
    config: Mapping,
    stored: Mapping[str, Stored | Quantised],
    places: Iterable[Place] = (),
) -> dict[str, Stored | Joined | Quantised]:
    """Locations by the host's names, of tensors by diffusers' names or the host's. places: of a file
    whose blocks have projections. A tensor that the full model has not keeps its name."""
    named, pieces = {}, {}
    own = _own_modules(host, config, places)
    for name, location in stored.items():
        module, _, leaf = name.rpartition(".")
        part = None if module in own else _part(host, name, stored)
        if module in own:
            named[f"{own[module]}.{leaf}"] = location
        elif part is None:
            named[_correction(host, config, usual_name(host.engine, name))] = location
        elif part.rows:
            named[part.name] = replace(location, flat=True)
        else:
            for position, piece in enumerate(part.pieces):
                cut = Cut(rows=((position,), len(part.pieces)))
                pieces.setdefault(part.name, {})[piece] = (
                    location.with_cut(cut) if part.of > 1 else location
                )
    for name, parts in pieces.items():
        ordered = tuple(parts[piece] for piece in sorted(parts))
        named[name] = ordered[0] if len(ordered) == 1 else Joined(ordered)
    return named


def _part(host: Host, name: str, names: Iterable[str]) -> Part | None:
    """Where the host has a tensor of the full model; None if this is not diffusers' name for one."""
    try:
        return host.engine.to_comfyui(name, names)
    except KeyError:
        return None


def _own_modules(host: Host, config: Mapping, places: Iterable[Place]) -> dict[str, str]:
    """Diffusers' name of each projection's linear map -> the host's name."""
    modules = {}
    for place in places:
        ours, theirs = (
            host.engine.block_prefix(config, place.index),
            host.prefix(config, place.index),
        )
        for kind in place.projections:
            parts = host.engine.projection_names[kind].items()
            modules |= {
                ours + name: theirs + host.engine.comfyui_projections[kind][part]
                for part, name in parts
            }
    return modules


def _correction(host: Host, config: Mapping, name: str) -> str:
    """The host's name of a tensor that belongs to a correction, which is the same as diffusers' but
    for the block's prefix; any other name is returned as it is."""
    prefix, mark, rest = name.partition("correction.")
    if not mark:
        return name
    indices = range(host.engine.num_blocks(config))
    index = next((i for i in indices if host.engine.block_prefix(config, i) == prefix), None)
    return name if index is None else host.prefix(config, index) + mark + rest
