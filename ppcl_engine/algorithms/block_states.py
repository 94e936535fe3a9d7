"""The inputs of one block on a whole calibration set, while a stage goes from block to block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..architectures import BlockState
from ..models.streaming import StateStore


@dataclass(frozen=True)
class BlockStates:
    """The inputs of one block, batch by batch. Its outputs go into the same store."""

    store: StateStore
    number: int
    """of the block, counted from 0 without gaps"""
    embedded: Sequence[BlockState]
    """each batch before the first block, for the parts of a state that no block changes"""

    def __iter__(self) -> Iterator[tuple[int, BlockState]]:
        for batch in range(len(self.embedded)):
            yield batch, self.of(batch)

    def of(self, batch: int) -> BlockState:
        like = replace(self.embedded[batch], modulated_text=None)
        return self.store.get(self.number, batch, like)

    def put(self, batch: int, after: BlockState) -> None:
        self.store.put(self.number + 1, batch, after)

    def drop(self) -> None:
        for batch in range(len(self.embedded)):
            self.store.drop(self.number, batch)
