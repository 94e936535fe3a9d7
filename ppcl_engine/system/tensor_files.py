"""safetensors files, read and written one tensor at a time.

The safetensors library maps whole files into memory, and the operating system counts mapped
pages as the process's own; streaming a 40 GB model needs plain reads, so the container format
(8 bytes of header length, JSON header, raw data) is read and written here.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from .atomic import replacing
from .finite import check_finite
from .json_text import json_text
from .two_of_four import decompress, dense_entries

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7 or newer: powers of two, as scales of blocks
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
NOT_WRITTEN = "it was not written; check the model and the calibration set that it comes from"
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


def write_tensors(
    path: Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
    gaps: bool = False,
) -> None:
    """A safetensors file of tensors that are already in memory. gaps: NaN stands for what was not
    measured."""
    entries = [
        TensorEntry(name, t.dtype, tuple(t.shape), lambda t=t: t, gaps)
        for name, t in tensors.items()
    ]
    write_tensor_stream(path, entries, metadata)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written: `read` makes it when its turn comes. gaps: NaN in it stands for what
    was not measured."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    gaps: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_stream(
    path: Path, entries: list[TensorEntry], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file written tensor by tensor, so memory holds one tensor at a time.

    Raises ValueError, and leaves what was there, for a tensor that is not finite.
    """
    header: dict = {"__metadata__": metadata} if metadata else {}
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
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for entry in entries:
            tensor = entry.read().detach().to("cpu", entry.dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape, (entry.name, tensor.shape, entry.shape)
            if not entry.gaps:
                check_finite({entry.name: tensor}, path, NOT_WRITTEN)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def check_exists(path: Path) -> None:
    """Raises ValueError for a model that is neither a file nor a folder."""
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist; give a model file or folder")


class TensorFile:
    """A safetensors file, opened for reading single tensors without mapping it into memory. What is
    compressed as 2:4 in it is seen as the dense matrices.

    Raises ValueError naming the file when it is not safetensors or is shorter than it says.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        size = self.path.stat().st_size
        if not self.path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} is not a file; pass a .safetensors file")
        with open(self.path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else HEADER_LIMIT + 1
            if length > min(HEADER_LIMIT, size):
                raise ValueError(
                    f"{path} is not a safetensors file (no header); pass a .safetensors file"
                )
            try:
                header = json.loads(file.read(length))
            except (
                ValueError,
                RecursionError,
            ):  # not JSON, not UTF-8, a number or a nesting without end
                raise ValueError(
                    f"{path} is not a safetensors file (bad header); pass a .safetensors file"
                ) from None
        metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
        if not isinstance(header, dict) or not (
            _is_metadata(metadata) and all(map(_is_entry, header.values()))
        ):
            raise ValueError(
                f"{path} is not a safetensors file (bad header); pass a .safetensors file"
            )
        self.metadata: dict[str, str] = metadata
        self._start = 8 + length
        end = self._start + max((e["data_offsets"][1] for e in header.values()), default=0)
        if end > size:
            raise ValueError(
                f"{path} is truncated: {size:,} bytes of {end:,}; copy or download it again"
            )
        self.entries: dict[str, dict] = dense_entries(header, path)

    def keys(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return self._known(self.entries[name]["dtype"], name)

    def _known(self, stored: str, name: str) -> torch.dtype:
        if stored not in DTYPES:
            raise ValueError(
                f"{self.path}: {name} is {stored}, which is not read; known: {', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def read(self, name: str, rows: int | None = None, start: int = 0) -> torch.Tensor:
        """The tensor, or `rows` of its rows from row `start` on."""
        parts = self.entries[name].get("parts")
        if parts is not None:
            return decompress(*(self._read(name, part, rows, start) for part in parts))
        return self._read(name, self.entries[name], rows, start)

    def _read(self, name: str, entry: dict, rows: int | None, start: int) -> torch.Tensor:
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if rows is not None:
            row = (last - first) // shape[0]
            first, last = first + start * row, first + (start + rows) * row
            shape = (rows, *shape[1:])
        buffer = torch.empty(last - first, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._start + first)
            view, done = memoryview(buffer.numpy()), 0
            while done < last - first:  # one read returns at most 2 GB
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(
                        f"{self.path} ended while {name} was read; copy or download it again"
                    )
                done += count
        return buffer.view(self._known(entry["dtype"], name)).reshape(shape)

    def read_all(self) -> dict[str, torch.Tensor]:
        return {name: self.read(name) for name in self.entries}


def _is_metadata(value: object) -> bool:
    """The format has text by names there, and nothing else."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_entry(value: object) -> bool:
    """A header's entry: dtype, shape, and offsets that hold just as many bytes (of dtypes that we
    know)."""
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(last)]}:
            if not (
                0 <= first <= last and all(isinstance(size, int) and size >= 0 for size in shape)
            ):
                return False
            return dtype not in DTYPES or last - first == math.prod(shape) * DTYPES[dtype].itemsize
    return False


def file_mark(path: Path) -> str:
    """Hash that tells one training's file from another's: metadata, losses and the values of all
    vectors."""
    file = TensorFile(path)
    digest = hashlib.sha256(json_text(file.metadata, sort_keys=True).encode())
    for name in sorted(file.keys()):
        if len(file.shape(name)) == 1:
            digest.update(name.encode() + file.read(name).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(eq=False)
class TwoParts:
    """A tensor that is stored as two. It is read once; when the second part is taken, nothing is
    held."""

    read: Callable[[], torch.Tensor]
    split: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    @cached_property
    def _parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split(self.read())

    def take_first(self) -> torch.Tensor:
        return self._parts[0]

    def take_second(self) -> torch.Tensor:
        return self.__dict__.pop("_parts")[1]
