"""GGUF files: read one tensor at a time, and written so that memory holds one at a time.

The gguf package reads the header, and turns blocks into numbers and back. Tensors are read here, not
mapped (see `tensor_files`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .atomic import replacing
from .finite import check_finite
from .json_text import shown
from .optional_packages import gguf
from .regular_files import check_regular, identity_of
from .tensor_files import NOT_WRITTEN, TensorEntry

GGUF_SUFFIX = ".gguf"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of a tensor whose rows were too short for blocks
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""GGUF's name of a type that is not made of blocks -> torch's"""
ALIGNMENT = 32  # the package's, of the bytes of each tensor
ENTRY, FIXED = 64, 512  # bytes of a tensor's or text's entry beside its name; of the rest
NUMPY = {"F32": np.float32, "F16": np.float16}


def is_gguf(path: Path) -> bool:
    return Path(path).suffix.lower() == GGUF_SUFFIX


@dataclass(frozen=True)
class _Place:
    """A tensor in the file."""

    kind: str
    """GGUF's name of its type"""
    shape: tuple[int, ...]
    """as stored: of blocks, bytes of a row"""
    whole: tuple[int, ...]
    """of its numbers"""
    offset: int
    size: int


class GGUFFile:
    """A GGUF file, opened, with the methods of a `TensorFile`; blocks are read as bytes, and as
    numbers by `dequantised`.

    Raises ValueError naming the file where it is damaged, and without the gguf package.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.identity = identity_of(check_regular(self.path))
        self._gguf = gguf(f"{path} is GGUF, which")
        try:
            reader = self._gguf.GGUFReader(self.path)
            self._places = {tensor.name: _place(reader, tensor) for tensor in reader.tensors}
            self.metadata: dict[str, str] = _texts(self._gguf, reader)
        except Exception as error:  # a damaged file makes the package raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise ValueError(
                f"{path} cannot be read as GGUF ({reason}); copy or download it again"
            ) from None

    def keys(self) -> list[str]:
        return list(self._places)

    def is_quantised(self, name: str) -> bool:
        return self._places[name].kind not in PLAIN

    def stored_as(self, name: str) -> str:
        """GGUF's name of the type."""
        return self._places[name].kind

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def whole(self, name: str) -> tuple[int, ...]:
        """The shape of the numbers."""
        return self._places[name].whole

    def dtype(self, name: str) -> torch.dtype:
        return PLAIN.get(self._places[name].kind, torch.uint8)

    def read(self, name: str, rows: int | None = None, start: int = 0) -> torch.Tensor:
        """The tensor, or some of its rows, as stored."""
        place = self._places[name]
        row = place.size // max(place.shape[0], 1) if place.shape else place.size
        first, size = (0, place.size) if rows is None else (start * row, rows * row)
        shape = place.shape if rows is None else (rows, *place.shape[1:])
        buffer = torch.empty(size, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            if identity_of(os.fstat(file.fileno())) != self.identity:
                raise ValueError(
                    f"{self.path} was replaced or changed while it was in use, before {shown(name)} was read; start again"
                )
            file.seek(place.offset + first)
            view = memoryview(buffer.numpy().data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError(
                        f"{self.path} ended while {shown(name)} was read; copy or download it again"
                    )
                view = view[count:]
        return buffer.view(self.dtype(name)).reshape(shape)

    def dequantised(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The numbers of blocks that were read, in float32, where they were."""
        place, data = self._places[name], stored.cpu().numpy()
        kind = self._gguf.GGMLQuantizationType[place.kind]
        try:
            values = torch.from_numpy(self._gguf.quants.dequantize(data, kind))
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: {shown(name)} is {place.kind}, which the gguf package cannot turn into numbers; "
                "take the model in another type"
            ) from None
        whole = len(stored) == place.shape[0]
        return values.reshape(place.whole if whole else values.shape).to(stored.device)


def _place(reader: Any, tensor: Any) -> _Place:
    whole = tuple(int(size) for size in reversed(tensor.shape))
    original = reader.get_field(ORIGINAL_SHAPE + tensor.name)
    if original is not None:
        whole = tuple(int(size) for size in original.contents())
    kind, (*rows, _) = tensor.tensor_type.name, tensor.data.shape or (1,)
    size = int(tensor.n_bytes)
    shape = whole if kind in PLAIN else (*rows, size // max(math.prod(rows), 1))
    return _Place(kind, shape, whole, int(tensor.data_offset), size)


def _texts(package: Any, reader: Any) -> dict[str, str]:
    """The file's texts by name."""
    text = package.GGUFValueType.STRING
    return {name: f.contents() for name, f in reader.fields.items() if f.types == [text]}


def block_columns(kind: str) -> int:
    """What a row's columns have to be a multiple of in this type of GGUF."""
    package = gguf(f"--store {kind.lower()}")
    return package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]][0]


def gguf_size(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in this type, with the gap up to the next one."""
    package = gguf("--layout gguf")
    block, size = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]]
    return -(-math.prod(shape) // block * size // ALIGNMENT) * ALIGNMENT


def gguf_rounded(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """The numbers that a matrix stands for when it is stored in this type, float32."""
    package = gguf(f"--store {kind.lower()}")
    type_, numbers = package.GGMLQuantizationType[kind], weight.detach().cpu().float().numpy()
    stored = package.quants.quantize(numbers, type_)
    return torch.from_numpy(package.quants.dequantize(stored, type_)).to(weight.device)


def gguf_header_size(names: Iterable[str], metadata: dict[str, str]) -> int:
    """At most so many bytes: names, shapes and places of tensors, and the texts."""
    texts = sum(len(name) + len(text.encode()) + ENTRY for name, text in metadata.items())
    return sum(len(name.encode()) + ENTRY for name in names) + texts + FIXED


def write_gguf(
    path: Path,
    architecture: str,
    entries: Iterable[tuple[str, TensorEntry]],
    metadata: dict[str, str],
) -> None:
    """Writes (GGUF's name of a type, tensor to be stored in it) one after the other.

    architecture: as ComfyUI-GGUF calls it. metadata: texts by name. Raises ValueError, leaving an
    existing file unchanged, for a tensor that is not finite.
    """
    package, entries = gguf("--layout gguf"), list(entries)
    with replacing(path) as temporary:
        writer = package.GGUFWriter(temporary, architecture)
        writer.add_quantization_version(package.GGML_QUANT_VERSION)
        for name, text in metadata.items():
            writer.add_string(name, text)
        for kind, entry in entries:
            _add_info(package, writer, kind, entry)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for kind, entry in entries:
                writer.write_tensor_data(_stored(package, kind, entry, path))
        finally:
            writer.close()


def _add_info(package: Any, writer: Any, kind: str, entry: TensorEntry) -> None:
    """The entry of the file's table, by which the package knows blocks from their bytes."""
    type_ = package.GGMLQuantizationType[kind]
    block, size = package.GGML_QUANT_SIZES[type_]
    shape, dtype = entry.shape, np.dtype(NUMPY.get(kind, np.uint8))
    if kind not in NUMPY:
        shape = package.quants.quant_shape_to_byte_shape(shape, type_)
    writer.add_tensor_info(entry.name, shape, dtype, math.prod(entry.shape) // block * size, type_)


def _stored(package: Any, kind: str, entry: TensorEntry, path: Path):
    tensor = entry.read().detach().to("cpu", torch.float32).contiguous()
    assert tuple(tensor.shape) == entry.shape, (entry.name, tensor.shape, entry.shape)
    check_finite({entry.name: tensor}, path, NOT_WRITTEN)
    return package.quants.quantize(tensor.numpy(), package.GGMLQuantizationType[kind])
