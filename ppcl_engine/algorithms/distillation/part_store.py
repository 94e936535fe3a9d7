"""Where parts in training wait for their turn: in the host's memory, or in files."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ...models.streaming import read_bare, write_bare

Tensors = dict[str, torch.Tensor]


class PartStore:
    """Tensors by (part, kind): its weights, and its moments and averages, which a forward does not
    read.

    Files are bare bytes, never flushed to disk: only the process that wrote them reads them. A
    training that is killed goes on from its last save.
    """

    def __init__(self, folder: Path | None):
        """folder: None keeps everything in memory."""
        self.folder = folder
        self._memory: dict[tuple[str, str], Tensors] = {}
        self._on_disk: dict[tuple[str, str], dict[str, tuple[torch.dtype, torch.Size]]] = {}
        self._numbers: dict[str, int] = {}  # names of parts hold what no file name may

    def put(self, part: str, kind: str, tensors: Tensors) -> None:
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        if self.folder is not None:
            write_bare(self._path(part, kind), tensors.values())
            self._on_disk[part, kind] = {name: (t.dtype, t.shape) for name, t in tensors.items()}
            return
        kept = self._memory.setdefault((part, kind), {})
        for name, tensor in tensors.items():
            if name in kept:
                kept[name].copy_(tensor)  # itself where the device is the host
            else:
                kept[name] = tensor.cpu()

    def get(self, part: str, kind: str) -> Tensors | None:
        """None of what was not put there."""
        if (part, kind) not in self._on_disk:
            return self._memory.get((part, kind))
        known = self._on_disk[part, kind]
        read = read_bare(self._path(part, kind), known.values())
        return dict(zip(known, read, strict=True))

    def drop_files(self, part: str) -> None:
        for kind in [kind for other, kind in self._on_disk if other == part]:
            del self._on_disk[part, kind]
            self._path(part, kind).unlink(missing_ok=True)

    def clear(self) -> None:
        self._memory.clear()
        self._on_disk.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, part: str, kind: str) -> Path:
        """Only used with a folder."""
        number = self._numbers.setdefault(part, len(self._numbers))
        return Path(self.folder or "") / f"part_{number}_{kind}"
