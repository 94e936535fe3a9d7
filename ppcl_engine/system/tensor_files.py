"""safetensors files, read and written one tensor at a time.

The safetensors library maps a file into memory, and the operating system counts the mapped pages as
the process's own: reading sixteen tensors of 268 MB one after the other counted 4.30 GB with its
`safe_open` and 0.27 GB here. It also checks no hashes and writes a file only from tensors that are
all in memory. So the container format (8 bytes of header length, a JSON header, raw data) is read
and written here; its names of types are the library's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .atomic import replacing
from .finite import check_finite
from .hashes import CHUNK, DIGITS, HASHES_KEY, TensorHash, hashes_of, hashes_text
from .headers import DTYPE_NAMES, DTYPES, METADATA, read_header
from .json_text import json_text, shown
from .regular_files import Identity, check_regular, identity_of
from .schemas import Kind, read_text
from .two_of_four import decompress, dense_entries

NOT_WRITTEN = "it was not written; check the model and the calibration set that it comes from"


def write_tensors(
    path: Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
    gaps: bool = False,
) -> None:
    """A safetensors file of tensors that are in memory. gaps: NaN marks what was not measured."""
    entries = [
        TensorEntry(name, t.dtype, tuple(t.shape), lambda t=t: t, gaps)
        for name, t in tensors.items()
    ]
    write_tensor_stream(path, entries, metadata)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written, made when its turn comes."""

    name: str
    """in the file"""
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    """makes the tensor"""
    gaps: bool = False
    """whether NaN in it marks what was not measured"""

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_stream(
    path: Path, entries: list[TensorEntry], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, written so that memory holds one tensor at a time.

    The hashes are written last, into the place that the header reserves for them. Raises
    ValueError, leaving an existing file unchanged, for a tensor that is not finite.
    """
    metadata = {name: text for name, text in (metadata or {}).items() if name != HASHES_KEY}
    hashes = {entry.name: "0" * DIGITS for entry in entries}
    text = _header(entries, metadata, hashes)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(text)
        for entry in entries:
            tensor = entry.read().detach().to("cpu", entry.dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape, (entry.name, tensor.shape, entry.shape)
            if not entry.gaps:
                check_finite({entry.name: tensor}, path, NOT_WRITTEN)
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            digest = TensorHash(entry.name, DTYPE_NAMES[entry.dtype], entry.shape)
            for begin in range(0, len(data), CHUNK):
                digest.update(data[begin : begin + CHUNK])
                file.write(data[begin : begin + CHUNK])
            hashes[entry.name] = digest.hexdigest()
        file.seek(0)
        file.write(_header(entries, metadata, hashes))


def _header(entries: list[TensorEntry], metadata: dict[str, str], hashes: dict[str, str]) -> bytes:
    """The header, with its length in front; as long for any hashes."""
    header: dict = {METADATA: {**metadata, HASHES_KEY: hashes_text(metadata, hashes)}}
    offset = 0
    for entry in entries:
        offsets = [offset, offset + entry.size]
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
        offset += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def header_size(entries: list[TensorEntry], metadata: dict[str, str]) -> int:
    """Bytes of a file beside its tensors."""
    return len(_header(entries, metadata, {entry.name: "0" * DIGITS for entry in entries}))


def check_exists(path: Path) -> None:
    """Raises ValueError for a model's path that is neither a file nor a folder."""
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist; give a model file or folder")
    if not Path(path).is_dir():
        check_regular(path)


class TensorFile:
    """A safetensors file, opened for reading single tensors without mapping it into memory.
    Matrices compressed as 2:4 appear as dense ones.

    Raises ValueError naming the file when it is not safetensors or does not have the length that it
    declares, when it lacks a tensor that is asked for, when it was changed since it was opened, and
    when a tensor differs from what was written.
    """

    def __init__(self, path: Path):
        header = read_header(path)
        self.path = Path(path)
        self._start, self._identity = header.start, header.identity
        self._hashes = hashes_of(self.path, header.identity, header.metadata, header.entries)
        self.metadata: dict[str, str] = {
            n: text for n, text in header.metadata.items() if n != HASHES_KEY
        }
        for name, entry in header.entries.items():
            entry["name"] = name
        self.entries: dict[str, dict] = dense_entries(header.entries, path)

    @property
    def identity(self) -> Identity:
        """The file as it was opened."""
        return self._identity

    @property
    def has_hashes(self) -> bool:
        return self._hashes is not None

    def text(self, key: str) -> str:
        """An entry of the metadata. Raises ValueError naming the file where it is missing."""
        if key not in self.metadata:
            raise ValueError(
                f"{self.path} lacks the metadata {key!r}, so it is another kind of file, or damaged"
            )
        return self.metadata[key]

    def about(self, key: str, kind: type[Kind] = dict) -> Kind:
        """The same, parsed as JSON of this kind. Raises ValueError naming file and field."""
        return read_text(kind, self.text(key), f"{self.path}: {key}")

    def keys(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return self._known(self._entry(name))

    def stored_as(self, name: str) -> str:
        """The dtype by the format's name, even if it is not known here."""
        return self._entry(name)["dtype"]

    def _entry(self, name: str) -> dict:
        if name not in self.entries:
            raise ValueError(
                f"{self.path} lacks the tensor {shown(name)}; it is incomplete: copy, download or make it again"
            )
        return self.entries[name]

    def _known(self, entry: dict) -> torch.dtype:
        stored = entry["dtype"]
        if stored not in DTYPES:
            name = entry.get("name", "a tensor")
            raise ValueError(
                f"{self.path}: {shown(name)} is {shown(stored, 20)}, which is not read; known: {', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def read(self, name: str, rows: int | None = None, start: int = 0) -> torch.Tensor:
        """The tensor, or `rows` of its rows beginning with row `start`."""
        entry = self._entry(name)
        if "parts" in entry:
            return decompress(*(self._read(part, rows, start) for part in entry["parts"]))
        return self._read(entry, rows, start)

    def verify(self, name: str) -> None:
        """Reads the tensor's bytes without keeping them. Raises ValueError when they are not the
        ones that were written."""
        entry = self._entry(name)
        for part in entry.get("parts", [entry]):
            self._verify(part)

    def _read(self, entry: dict, rows: int | None, start: int) -> torch.Tensor:
        first, last = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), self._known(entry)
        if rows is not None:
            self._verify(entry)
            row = (last - first) // max(shape[0], 1)
            first, last = first + start * row, first + (start + rows) * row
            shape = (rows, *shape[1:])
        buffer = torch.empty(last - first, dtype=torch.uint8)
        digest = None if rows is not None else self._digest(entry)
        view = memoryview(buffer.numpy().data)
        for begin, end in self._pieces(entry["name"], first, view):
            if digest is not None:
                digest.update(view[begin:end])
        self._check(entry["name"], digest)
        return buffer.view(dtype).reshape(shape)

    def _verify(self, entry: dict) -> None:
        digest = self._digest(entry)
        if digest is None:
            return
        first, last = entry["data_offsets"]
        for begin in range(first, last, CHUNK):
            view = memoryview(bytearray(min(CHUNK, last - begin)))
            for _ in self._pieces(entry["name"], begin, view):
                pass
            digest.update(view)
        self._check(entry["name"], digest)

    def _check(self, name: str, digest: TensorHash | None) -> None:
        """Raises ValueError for another hash than the file's."""
        if self._hashes is not None and digest is not None:
            self._hashes.check(name, digest.hexdigest())

    def _digest(self, entry: dict) -> TensorHash | None:
        """None: nothing to check, or already checked."""
        if self._hashes is None or not self._hashes.wanted(entry["name"]):
            return None
        return TensorHash(entry["name"], entry["dtype"], entry["shape"])

    def _pieces(self, name: str, first: int, view: memoryview) -> Iterator[tuple[int, int]]:
        """Fills `view` with the bytes that follow `first`; yields (begin, end) of each piece."""
        done = 0
        with self._opened(name) as file:
            file.seek(self._start + first)
            while done < len(view):
                count = file.readinto(view[done : done + CHUNK])
                if not count:
                    raise ValueError(
                        f"{self.path} ended while {shown(name)} was read; copy or download it again"
                    )
                yield done, done + count
                done += count

    @contextmanager
    def _opened(self, name: str) -> Iterator:
        """The very file whose header was read: another one would be read with the wrong header.

        It is not kept open in between, because Windows would then not let anybody replace it.
        """
        with open(self.path, "rb", buffering=0) as file:
            self._check_same(file, name)
            yield file
            self._check_same(file, name)

    def _check_same(self, file, name: str) -> None:
        if identity_of(os.fstat(file.fileno())) != self._identity:
            raise ValueError(
                f"{self.path} was replaced or changed while it was in use, before {shown(name)} was read; start again"
            )

    def read_all(self) -> dict[str, torch.Tensor]:
        return {name: self.read(name) for name in self.entries}


def file_mark(path: Path) -> str:
    """A hash that tells one training's file from another's: of metadata, losses and all vectors."""
    file = TensorFile(path)
    digest = hashlib.sha256(json_text(file.metadata, sort_keys=True).encode())
    for name in sorted(file.keys()):
        if len(file.shape(name)) == 1:
            digest.update(name.encode() + file.read(name).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(eq=False)
class MadeOnce:
    """Tensors that are made together when the first of them is taken; nothing of those that were
    taken is kept in memory."""

    make: Callable[[], dict[str, torch.Tensor]]
    """makes them by name"""
    _made: dict[str, torch.Tensor] | None = None

    def take(self, name: str) -> torch.Tensor:
        if self._made is None:
            self._made = dict(self.make())
        return self._made.pop(name)


class OneAtATime:
    """Tensors of many groups, such as blocks, that are taken group by group: a group is read once, and
    only after the one before it is let go."""

    def __init__(self, read: Callable[[Any], Mapping[str, torch.Tensor]]):
        """read: group -> its tensors by name."""
        self.read, self._group = read, None
        self._tensors: Mapping[str, torch.Tensor] = {}

    def __call__(self, group: Hashable, name: str) -> torch.Tensor:
        if group != self._group:
            self._tensors = {}
            self._group, self._tensors = group, self.read(group)
        return self._tensors[name]
