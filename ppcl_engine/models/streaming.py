"""Where blocks and the states between them come from: memory, or disk, one after the other.

Stages see one interface. Resident: every block stays on the device. Streamed: a block is read
from its file when its turn comes, the next one meanwhile by a thread. Same arithmetic, so the
results are the same bits.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..architectures import Architecture, BlockState, Inputs, placed
from ..system.machine import return_freed_memory
from ..system.tensor_files import TensorFile, write_tensors
from .surgery import Edit
from .weights import Weights


class Teacher:
    """The teacher's outer layers on the device and its blocks, resident or streamed. `target_only`:
    of its states, those of references count in no statistic and no loss."""

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
            coming = reader.submit(self._load, indices[0]) if indices else None
            for position, index in enumerate(indices):
                block = coming.result()
                if position + 1 < len(indices):
                    coming = reader.submit(self._load, indices[position + 1])
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


class StreamedBlock(nn.Module):
    """A place in a model whose block is read when it is called and dropped after: any forward,
    little memory."""

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
    """What `assembly.assemble` asks for the teacher's blocks: modules with weights, or streamed
    places."""

    def load(index: int, edit: Edit) -> nn.Module:
        return edit(weights.block(index, dtype, device))

    return (lambda index, edit: StreamedBlock(partial(load, index, edit))) if streamed else load


class StateStore:
    """Both streams of a batch at a block boundary, by (key, batch): in memory, or a file each; and
    the modulated text that a text group goes on reading.

    Key i is the input of block i; other states (chains of a detection) have names of their own.
    What does not change along the blocks (conditioning, rotary tables, masks) is computed again
    from the inputs, not stored.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._memory: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: int | str, batch: int, state: BlockState) -> None:
        streams = {"image": state.image.detach(), "text": state.text.detach()}
        if state.modulated_text is not None:
            streams["modulated_text"] = state.modulated_text.detach()
        if self.folder is None:
            self._memory[str(key), batch] = streams
        else:
            write_tensors(self._path(key, batch), streams)

    def get(self, key: int | str, batch: int, like: BlockState) -> BlockState:
        """The stored streams in a state whose other parts are those of `like`."""
        if self.folder is None:
            streams = self._memory[str(key), batch]
        else:
            streams = TensorFile(self._path(key, batch)).read_all()
        state = like.with_streams(
            streams["image"].to(like.image.device), streams["text"].to(like.text.device)
        )
        modulated = streams.get("modulated_text")
        return (
            state
            if modulated is None
            else replace(state, modulated_text=modulated.to(like.text.device))
        )

    def has(self, key: int | str, batch: int) -> bool:
        if self.folder is None:
            return (str(key), batch) in self._memory
        return self._path(key, batch).exists()

    def drop(self, key: int | str, batch: int) -> None:
        if self.folder is None:
            self._memory.pop((str(key), batch), None)
        else:
            self._path(key, batch).unlink(missing_ok=True)

    def clear(self) -> None:
        self._memory.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: int | str, batch: int) -> Path:
        return self.folder / f"state_{key}_batch_{batch}.safetensors"


def sweep(
    teacher: Teacher, embedded: Sequence[BlockState], store: StateStore, last: int
) -> Iterator[tuple[int, nn.Module, list[int]]]:
    """Walks blocks 0..last over all batches; yields (index, block, batches) with boundary index+1
    stored.

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
    """The state behind the last block. `seen` takes the input of every block and that last
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
    """The same of the teacher itself, resident or streamed."""
    blocks = (block for _, block in teacher.walk(0, teacher.num_blocks - 1))
    return run_chain(teacher.architecture, teacher.outer, blocks, teacher.embed(inputs), seen)


def embed_with(teacher: Teacher, outer: nn.Module, inputs: Inputs) -> BlockState:
    """`teacher.embed` through other outer layers."""
    like = copy.copy(teacher)
    like.outer = outer
    return like.embed(inputs)
