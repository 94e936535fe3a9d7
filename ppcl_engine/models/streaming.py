"""Where blocks and the states between them are kept: in memory, or on disk and read one after the
other.

Stages see one interface. Resident: every block stays on the device. Streamed: a block is read from
its file when its turn comes, while a thread reads the next one. Same arithmetic, so the results are
the same bits.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..architectures import Architecture, BlockState, Inputs, placed
from ..system.distributed import processes
from ..system.finite import BAD_MODEL, check_finite, checked_velocity
from ..system.machine import free_memory, return_freed_memory
from .surgery import Edit
from .weights import Weights

ROOM_SHARE = 0.2  # of the host's free memory, for states that would else go to disk


class Teacher:
    """The teacher's outer layers on the device, and its blocks, resident or streamed.

    `target_only`: references are left out of every statistic and loss.
    """

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype,
        device: str,
        streamed: bool,
        target_only: bool = False,
    ):
        self.weights, self.dtype, self.device, self.streamed = weights, dtype, device, streamed
        self.target_only = target_only
        self.architecture: Architecture = weights.architecture
        self.config = weights.config
        self.num_blocks = weights.num_blocks
        self.outer = weights.outer(dtype, device)
        self._resident = (
            None if streamed else [self._load(index) for index in range(self.num_blocks)]
        )

    def block(self, index: int) -> nn.Module:
        return self._load(index) if self._resident is None else self._resident[index]

    def walk(self, first: int, last: int) -> Iterator[tuple[int, nn.Module]]:
        """Blocks first..last, both included; streamed ones are dropped when the loop goes on."""
        yield from self.blocks(range(first, last + 1))

    def blocks(self, indices: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        if self._resident is not None:
            yield from ((index, self._resident[index]) for index in indices)
            return
        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(self._load, index) for index in indices[:1]]
            for position, index in enumerate(indices):
                block = coming.pop().result()
                coming += [reader.submit(self._load, i) for i in indices[position + 1 :][:1]]
                yield index, block
                del block
                return_freed_memory()

    def embed(self, inputs: Inputs) -> BlockState:
        state = self.architecture.embed(self.outer, placed(inputs, self.device, self.dtype))
        return replace(state, target_only=self.target_only)

    def used_streams(self, index: int) -> tuple[str, ...]:
        return self.architecture.used_streams(self.config, index)

    def _load(self, index: int) -> nn.Module:
        return self.weights.block(index, self.dtype, self.device)


def mixed_precision(teacher: Teacher, cache: bool = True) -> AbstractContextManager:
    """Weights in training stay float32; forward and backward run in the teacher's precision.

    Weights in bfloat16 would not move: at the usual learning rates a step is less than half the
    last bit of most of them. cache: keeps what each weight becomes to the end of the context.
    """
    kind, enabled = teacher.device.split(":")[0], teacher.dtype is torch.bfloat16
    return torch.autocast(kind, torch.bfloat16, enabled=enabled, cache_enabled=cache)


class StreamedBlock(nn.Module):
    """A block that is read when it is called and dropped afterwards: any forward in little
    memory."""

    def __init__(self, load: Callable[[], nn.Module]):
        super().__init__()
        self.load = load

    def forward(self, *arguments, **named):
        outputs = self.load()(*arguments, **named)
        return_freed_memory()
        return outputs


def block_loader(
    weights: Weights, dtype: torch.dtype, device: str, streamed: bool
) -> Callable[[int, Edit], nn.Module]:
    """The teacher's blocks for `assembly.assemble`: modules with weights, or streamed blocks."""

    def load(index: int, edit: Edit) -> nn.Module:
        return edit(weights.block(index, dtype, device))

    return (lambda index, edit: StreamedBlock(partial(load, index, edit))) if streamed else load


def check_states(boundary: int, state: BlockState) -> None:
    """Raises ValueError, naming the block that made it, where the input of block `boundary` is not
    finite."""
    where = (
        f"the model is not finite from block {boundary - 1} on"
        if boundary
        else "the model, before its first block"
    )
    streams = {"image": state.image, "text": state.text}
    check_finite(
        streams if boundary else {**streams, "conditioning": state.conditioning}, where, BAD_MODEL
    )


def room_for_states(share: float = ROOM_SHARE) -> float:
    """Bytes of the host's memory in which states may wait instead of on disk."""
    return share * free_memory() / processes().count


class StateStore:
    """Both streams of a batch at a block boundary, and the modulated text that a text group still
    reads, by (key, batch): in memory, or one file each.

    Key i is the input of block i; other states (the chains of detection) have names of their own.
    What does not change along the blocks (conditioning, rotary tables, masks) is computed again
    from the inputs, not stored. Files are bare bytes, never flushed to disk: only the process that
    wrote them reads them, and a new process writes its own.
    """

    def __init__(self, folder: Path | None, rest: str | None = None, room: float = 0):
        """folder: None keeps everything in memory. rest: the device on which states in memory wait;
        None: the one that they were made on. room: bytes of the host's memory that are used before
        the folder is."""
        self.folder, self.room = folder, room
        self.rest = rest if folder is None else "cpu"
        self._memory: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
        self._on_disk: dict[tuple[str, int], dict[str, tuple[torch.dtype, torch.Size]]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: int | str, batch: int, state: BlockState) -> None:
        """Raises ValueError naming the block from which the model's states are not finite; a
        chain's may be."""
        if isinstance(key, int):
            check_states(key, state)
        streams, name = streams_of(state, self.rest), (str(key), batch)
        self.drop(key, batch)
        if self.folder is None or _bytes(streams) <= self.room:
            self.room -= _bytes(streams)
            self._memory[name] = streams
        else:
            write_bare(self._path(key, batch), streams.values())
            self._on_disk[name] = {part: (t.dtype, t.shape) for part, t in streams.items()}

    def get(self, key: int | str, batch: int, like: BlockState) -> BlockState:
        """The stored streams in a state that otherwise equals `like`."""
        if (str(key), batch) in self._memory:
            return state_of(self._memory[str(key), batch], like)
        known = self._on_disk[str(key), batch]
        return state_of(
            dict(zip(known, read_bare(self._path(key, batch), known.values()), strict=True)), like
        )

    def has(self, key: int | str, batch: int) -> bool:
        name = (str(key), batch)
        return name in self._memory or name in self._on_disk

    def drop(self, key: int | str, batch: int) -> None:
        self.room += _bytes(self._memory.pop((str(key), batch), {}))
        if self._on_disk.pop((str(key), batch), None) is not None:
            self._path(key, batch).unlink(missing_ok=True)

    def clear(self) -> None:
        self.room += sum(map(_bytes, self._memory.values()))
        self._memory.clear()
        self._on_disk.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: int | str, batch: int) -> Path:
        """Only used with a folder."""
        return Path(self.folder or "") / f"state_{key}_batch_{batch}"


def _bytes(streams: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in streams.values())


def state_bytes(state: BlockState) -> int:
    """Bytes that it takes in a store."""
    return _bytes(streams_of(state))


def streams_of(state: BlockState, rest: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a state that change along the blocks, on the device `rest` if given."""
    streams = {"image": state.image, "text": state.text, "modulated_text": state.modulated_text}
    kept = {name: tensor.detach() for name, tensor in streams.items() if tensor is not None}
    return kept if rest is None else {name: tensor.to(rest) for name, tensor in kept.items()}


def state_of(streams: dict[str, torch.Tensor], like: BlockState) -> BlockState:
    """These streams in a state that otherwise equals `like`, on its device."""
    state = like.with_streams(
        streams["image"].to(like.image.device), streams["text"].to(like.text.device)
    )
    modulated = streams.get("modulated_text")
    return (
        state
        if modulated is None
        else replace(state, modulated_text=modulated.to(like.text.device))
    )


def write_bare(path: Path, tensors: Iterable[torch.Tensor]) -> None:
    """The tensors' bytes, one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "wb", buffering=0) as file:
            for tensor in tensors:
                view, done = _bytes_of(tensor.cpu().contiguous()), 0
                while done < len(view):  # one write takes at most 2 GB
                    done += file.write(view[done:])
    except OSError as error:  # a full disk does not say where it is full
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def read_bare(
    path: Path, known: Iterable[tuple[torch.dtype, torch.Size]]
) -> Iterator[torch.Tensor]:
    with open(path, "rb", buffering=0) as file:
        for dtype, shape in known:
            tensor = torch.empty(shape, dtype=dtype)
            view, done = _bytes_of(tensor), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(
                        f"{path} ended while it was read; something else wrote into it, run the stage again"
                    )
                done += count
            yield tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def sweep(
    teacher: Teacher, embedded: Sequence[BlockState], store: StateStore, last: int
) -> Iterator[tuple[int, nn.Module, list[int]]]:
    """Walks blocks 0..last over all batches; yields (index, block, batches) once boundary index+1
    is stored.

    Boundary `index` is dropped when the caller is done with the block.
    """
    batches = list(range(len(embedded)))
    for batch in batches:
        store.put(0, batch, embedded[batch])
    for index, block in teacher.walk(0, last):
        for batch in batches:
            before = store.get(index, batch, embedded[batch])
            store.put(index + 1, batch, teacher.architecture.run_block(block, before))
        yield index, block, batches
        for batch in batches:
            store.drop(index, batch)


def run_blocks(
    architecture: Architecture,
    blocks: Iterable[nn.Module],
    state: BlockState,
    seen: list[BlockState] | None = None,
) -> BlockState:
    """The state behind the last block. `seen` collects the input of every block, and that last
    state."""
    for block in blocks:
        if seen is not None:
            seen.append(state)
        state = architecture.run_block(block, state)
    if seen is not None:
        seen.append(state)
    return state


def run_chain(
    architecture: Architecture,
    outer: nn.Module,
    blocks: Iterable[nn.Module],
    state: BlockState,
    seen: list[BlockState] | None = None,
) -> torch.Tensor:
    """Velocity [n, image_tokens, channels] of the chain on an embedded state."""
    return architecture.finish(outer, run_blocks(architecture, blocks, state, seen))


def teacher_velocity(
    teacher: Teacher, inputs: Inputs, seen: list[BlockState] | None = None
) -> torch.Tensor:
    """The velocity of the teacher itself, resident or streamed. Raises ValueError where it is not
    finite."""
    blocks = (block for _, block in teacher.walk(0, teacher.num_blocks - 1))
    return checked_velocity(
        run_chain(teacher.architecture, teacher.outer, blocks, teacher.embed(inputs), seen)
    )


def embed_with(teacher: Teacher, outer: nn.Module, inputs: Inputs) -> BlockState:
    """`teacher.embed`, but with these outer layers."""
    like = copy.copy(teacher)
    like.outer = outer
    return like.embed(inputs)
