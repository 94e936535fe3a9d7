"""A hash of every tensor in files of ours, against flipped bits, swapped names and other dtypes
(not against forgers).

`ppcl_hashes` in a safetensors file's metadata is JSON: {"algorithm": "xxh3_64", "metadata": {entry:
hash}, "tensors": {name: hash}}. A tensor's hash is of its name, dtype, shape and bytes as stored.
Files without it are read as they are.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from .json_text import NotJSON, parse_json, shown
from .regular_files import Identity

HASHES_KEY = "ppcl_hashes"
ALGORITHM = "xxh3_64"
DIGITS = 16
CHUNK = 512 << 10
"""bytes that are read, then hashed while they lie in the processor's cache: in pieces of 4 MB, or by
a thread beside the reading, hashing cost a fifth of a load"""
MOST_FILES = 512  # whose checked tensors are remembered
DAMAGED = "it was damaged or changed after it was written; copy or make it again"

_LOCK = threading.Lock()
_CHECKED: OrderedDict[Identity, set[str]] = OrderedDict()
"""file as it was last changed -> names of the tensors that were found to be whole"""


class TensorHash:
    """Takes a tensor's bytes in pieces, in their order."""

    def __init__(self, name: str, dtype: str, shape: Iterable[int]):
        self._state = xxhash.xxh3_64(
            f"{name}\n{dtype}\n{list(shape)}\n".encode("utf-8", "surrogatepass")
        )

    def update(self, data) -> None:
        self._state.update(data)

    def hexdigest(self) -> str:
        return self._state.hexdigest()


def text_hash(text: str) -> str:
    return xxhash.xxh3_64(text.encode("utf-8", "surrogatepass")).hexdigest()


def hashes_text(metadata: Mapping[str, str], tensors: Mapping[str, str]) -> str:
    """What a file says of itself; as long for any hashes, so that it can be written before they are
    known."""
    texts = {name: text_hash(text) for name, text in metadata.items()}
    return json.dumps(
        {"algorithm": ALGORITHM, "metadata": texts, "tensors": dict(tensors)}, separators=(",", ":")
    )


@dataclass(frozen=True)
class Hashes:
    """Those of one file, as it was when it was opened."""

    path: Path
    identity: Identity
    tensors: dict[str, str]

    def wanted(self, name: str) -> bool:
        """Whether the tensor was not checked yet."""
        return name not in _CHECKED.get(self.identity, ())

    def check(self, name: str, found: str) -> None:
        """Raises ValueError for another hash than the file's."""
        if found != self.tensors[name]:
            raise ValueError(
                f"{self.path}: {shown(name)} does not have the hash that was stored with it: {DAMAGED}"
            )
        with _LOCK:  # blocks are read ahead by a thread
            _CHECKED.setdefault(self.identity, set()).add(name)
            _CHECKED.move_to_end(self.identity)
            while len(_CHECKED) > MOST_FILES:
                _CHECKED.popitem(last=False)


def forget() -> None:
    """Everything is checked again."""
    _CHECKED.clear()


def hashes_of(
    path: Path, identity: Identity, metadata: Mapping[str, str], names: Iterable[str]
) -> Hashes | None:
    """None: a file without hashes. Raises ValueError where metadata or the list of tensors is not
    what was hashed."""
    if HASHES_KEY not in metadata:
        return None
    texts, tensors = _parsed(path, metadata[HASHES_KEY])
    for name, expected in texts.items():
        if name not in metadata or text_hash(metadata[name]) != expected:
            raise ValueError(
                f"{path}: its metadata {name!r} does not have the hash that was stored with it: {DAMAGED}"
            )
    if odd := sorted(set(names) ^ set(tensors)):
        raise ValueError(
            f"{path}: the tensor {odd[0][:80]!r} is missing, or has no hash: {DAMAGED}"
        )
    return Hashes(Path(path), identity, tensors)


def _parsed(path: Path, text: str) -> tuple[dict[str, str], dict[str, str]]:
    try:
        values = parse_json(text)
    except NotJSON:
        values = None
    match values:
        case {"algorithm": str(algorithm), "metadata": dict(texts), "tensors": dict(tensors)}:
            if algorithm != ALGORITHM:
                raise ValueError(
                    f"{path} has hashes of the kind {algorithm[:20]!r}, not {ALGORITHM}; update ComfyUI-PPCL"
                )
            return texts, tensors
    raise ValueError(f"{path}: its {HASHES_KEY} cannot be read: {DAMAGED}")
