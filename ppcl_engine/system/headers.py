"""The header of a safetensors file, read and checked: every byte after it belongs to exactly one
tensor."""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from .json_text import NotJSON, parse_json, shown
from .regular_files import Identity, check_regular, identity_of

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
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
METADATA = "__metadata__"
MOST_DIMENSIONS = 16
LARGEST = 1 << 62  # of a size or an offset
PASS = "pass a .safetensors file"
OTHERS = {
    b"GGUF": "is a GGUF file; give it the ending .gguf",
    b"PK\x03\x04": "is a PyTorch file (.bin, .pt, .ckpt); pass a .safetensors file, or the folder that it belongs to",
    b"\x80\x02": "is a pickled PyTorch file, which can run code; pass a .safetensors file",
}
"""first bytes of a file -> what the error says"""


@dataclass(frozen=True)
class Header:
    """A file's header."""

    metadata: dict[str, str]
    """texts by name"""
    entries: dict[str, dict]
    """name -> dtype, shape, data_offsets counted from `start`"""
    start: int
    """where the tensors' bytes begin"""
    identity: Identity
    """the file as it was opened"""


def read_header(path: Path) -> Header:
    """Raises ValueError, in one line naming the file and the entry, for a file that is not
    safetensors."""
    check_regular(path)
    with open(path, "rb") as file:
        # of the file that was opened; by now the path may lead to another one
        status = os.fstat(file.fileno())
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else HEADER_LIMIT + 1
        if length > min(HEADER_LIMIT, status.st_size):
            _refuse(path, prefix)
        text = file.read(length)
    try:
        header = parse_json(text)
    except NotJSON as error:
        raise ValueError(
            f"{path} is not a safetensors file (bad header: {error}); {PASS}"
        ) from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file (bad header: not an object); {PASS}")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError(
            f"{path} is not a safetensors file (bad header: {METADATA} is not an object of texts); {PASS}"
        )
    for name, entry in header.items():
        if reason := _fault(entry):
            raise ValueError(
                f"{path} is not a safetensors file (bad header: {name[:80]!r}: {reason}); {PASS}"
            )
    _check_cover(path, header, status.st_size - 8 - length)
    return Header(metadata, header, 8 + length, identity_of(status))


def _refuse(path: Path, prefix: bytes) -> NoReturn:
    said = next((said for first, said in OTHERS.items() if prefix.startswith(first)), None)
    raise ValueError(f"{path} {said or f'is not a safetensors file (no header); {PASS}'}")


def _fault(entry: object) -> str | None:
    """Why an entry does not describe a tensor; None when it does."""
    if not isinstance(entry, dict):
        return "not an object"
    if not isinstance(entry.get("dtype"), str):
        return "dtype is missing or not a text"
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(map(_is_size, shape)):
        return "shape is not a list of sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        return "data_offsets are not two positions"
    size, dtype = offsets[1] - offsets[0], DTYPES.get(entry["dtype"])
    if size < 0 or (dtype is not None and size != math.prod(shape) * dtype.itemsize):
        return f"{size:,} bytes do not make a tensor {shape} of {shown(entry['dtype'], 20)}"
    return None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _check_cover(path: Path, header: dict[str, dict], held: int) -> None:
    """Every byte belongs to one tensor. Raises ValueError for overlaps, holes, and a file of
    another length."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end:
            what = (
                "overlaps the tensor before it"
                if first < end
                else "leaves bytes before it that belong to no tensor"
            )
            raise ValueError(
                f"{path} is not a safetensors file (bad header: {name[:80]!r} {what}); {PASS}"
            )
        end = last
    if end > held:
        raise ValueError(
            f"{path} is truncated: {held:,} bytes of tensors, not {end:,}; copy or download it again"
        )
    if end < held:
        raise ValueError(
            f"{path} has {held - end:,} bytes behind its last tensor; copy or download it again"
        )
