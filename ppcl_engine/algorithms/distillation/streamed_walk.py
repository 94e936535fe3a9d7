"""A step of polish or finetune with one block at a time on the device: forward, with the states
between blocks kept, then backward.

Backward, a block's weights come back, its forward runs again from its kept input, the gradient of
its output becomes those of its weights and of its input, and its parts take their steps at once.
The same operations in the same order as with all blocks in memory, so the results are the same
bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...architectures import BlockState
from ...models.streaming import StateStore, mixed_precision, streams_of
from ...models.streaming import state_of as state_of_streams
from ...system.machine import return_freed_memory
from .part_optimizer import PartOptimizer
from .part_store import PartStore, Tensors
from .saved_training import AVERAGE, SavedParts
from .trainable import run_block_made
from .walks import (
    OUTER,
    Chain,
    ChainBlock,
    Rules,
    load,
    names_by_part,
    optimizer_of,
    part_of,
    state_of,
)

STREAMS = ("image", "text", "modulated_text")
"""of a state, that change along the blocks; the conditioning does not, but all blocks read it"""

Gradients = dict[str, torch.Tensor]


class StreamedWalk:
    """Parts wait in a store between their turns; the outer layers, if they are trained, stay on the
    device.

    module: with all blocks on the meta device. begin: part -> its tensors by the names that they
    have in its sub-module, as training begins. folder: of what waits; None: the host's memory.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: Sequence[str],
        rules: Rules,
        begin: Callable[[str], Tensors],
        device: str,
        folder: Path | None,
    ):
        self.module, self.rules, self.device = module.requires_grad_(True), rules, device
        self.names, self.begin = names_by_part(module, parts), begin
        parameters = {name for name, _ in module.named_parameters()}
        self._counts = {n: 0.0 for names in self.names.values() for n in names if n in parameters}
        self._averaged = dict.fromkeys(parts, 0)
        self._hollow = {part: self._submodule(part).state_dict() for part in parts if part != OUTER}
        self._outer = optimizer_of(self, OUTER) if OUTER in parts else None
        self._saved: SavedParts | None = None
        self._uses_averages = False
        self.folder, self.store = folder, PartStore(folder and folder / "parts")
        self.states = StateStore(folder and folder / "states", rest="cpu")

    def loss(self, chain: Chain) -> torch.Tensor:
        architecture = chain.teacher.architecture
        with mixed_precision(chain.teacher, cache=False):  # of all blocks, it would not be flat
            with torch.no_grad():
                state = self._first = chain.begin()
            for position, block in enumerate(chain.blocks):
                self.states.put(f"block_{position}", 0, state)
                with self.filled(block.parts):  # with gradients, since kernels may differ without
                    after = run_block_made(architecture, block.make, state, chain.bits)
                state = state_of_streams(streams_of(after), self._first)
        self._chain, (state, self._gradients) = chain, on_leaves(state, self._wanted(chain))
        with mixed_precision(chain.teacher):
            velocity = architecture.finish(chain.outer, state)
        self._loss = chain.error(velocity)
        return self._loss

    def gradients(self) -> Iterator[PartOptimizer]:
        chain = self._chain
        self._loss.backward()
        gradients = self._gradients
        del self._loss, self._gradients
        first = next(position for position, block in enumerate(chain.blocks) if block.parts)
        for position in reversed(range(0 if chain.trains_outer else first, len(chain.blocks))):
            block = chain.blocks[position]
            with self.filled(block.parts):
                reaches_on = position > first or chain.trains_outer
                wanted = self._wanted(chain) if reaches_on else ()
                gradients = self._pulled_back(chain, block, position, wanted, gradients)
                yield from self._stepping(block.parts)
        if chain.trains_outer:
            with mixed_precision(chain.teacher):
                state = chain.begin()
            backward(state, gradients)
            assert self._outer is not None
            yield self._outer
        self.states.clear()

    def _pulled_back(
        self,
        chain: Chain,
        block: ChainBlock,
        position: int,
        wanted: Sequence[str],
        gradients: Gradients,
    ) -> Gradients:
        """Gradients of a block's output -> of its input, and into its parameters."""
        state = self.states.get(f"block_{position}", 0, self._first)
        self.states.drop(f"block_{position}", 0)
        state, found = on_leaves(state, wanted)
        with mixed_precision(chain.teacher):
            after = run_block_made(chain.teacher.architecture, block.make, state, chain.bits)
        backward(after, gradients)
        return found

    def _stepping(self, parts: Iterable[str]) -> Iterator[PartOptimizer]:
        for part in parts:
            optimizer = self._optimizer(part)
            yield optimizer
            self._keep(part, optimizer)

    def _wanted(self, chain: Chain) -> Sequence[str]:
        return (*STREAMS, "conditioning") if chain.trains_outer else STREAMS

    @contextmanager
    def filled(self, parts: Iterable[str]) -> Iterator[None]:
        parts = [part for part in parts if part != OUTER]
        for part in parts:
            weights = self._weights(part)
            state = {name.removeprefix(part): t.to(self.device) for name, t in weights.items()}
            self._submodule(part).load_state_dict(state, assign=True)
        try:
            yield
        finally:
            for part in parts:
                self._submodule(part).load_state_dict(self._hollow[part], assign=True)
            return_freed_memory()

    @contextmanager
    def at_hand(self, part: str, last: bool = False) -> Iterator[PartOptimizer]:
        with self.filled((part,)):
            optimizer = self._optimizer(part)
            yield optimizer
            if last:
                self.store.drop_files(part)
            if not last or self.folder is None:
                self._keep(part, optimizer)

    def counts(self) -> dict[str, float]:
        return self._counts | (self._outer.counts() if self._outer else {})

    @torch.no_grad()
    def go_on_from(self, saved: SavedParts, step: int) -> None:
        self.store.clear()
        self._counts = dict(saved.counts)
        if self._outer is not None:
            weights = saved.weights(OUTER)
            for name, parameter in self._outer.parameters.items():
                parameter.copy_(weights[name])
            load(self._outer, saved.state(OUTER), saved.counts, step)
        self.was_saved(saved, step)

    def was_saved(self, saved: SavedParts, step: int) -> None:
        self._saved, self._averaged = saved, dict.fromkeys(self._averaged, step)

    @torch.no_grad()
    def use_averages(self) -> None:
        self._uses_averages = True
        if self._outer is not None:
            for name, parameter in self._outer.parameters.items():
                parameter.copy_(self._outer.used()[name])

    def close(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _submodule(self, part: str) -> nn.Module:
        return part_of(self.module, part)

    def _weights(self, part: str) -> Tensors:
        """What waits in the store; what does not is as it was saved, or as training began."""
        weights = self.store.get(part, "weights")
        if weights is None and self._saved is not None:
            weights = self._saved.weights(part)
        if weights is None:
            weights = {f"{part}{name}": tensor for name, tensor in self.begin(part).items()}
        if self._uses_averages and self.rules.ema:
            state = {n: t for n, t in self._state(part).items() if n.startswith(AVERAGE)}
            averages = {n.removeprefix(AVERAGE): t for n, t in state.items()}
            weights = weights | {n: t.to(weights[n].dtype) for n, t in averages.items()}
        return weights

    def _state(self, part: str) -> Tensors:
        state = self.store.get(part, "state")
        if state is None:
            return self._saved.state(part) if self._saved is not None else {}
        return state

    def _optimizer(self, part: str) -> PartOptimizer:
        """A part's, whose weights are in the module."""
        if part == OUTER:
            assert self._outer is not None
            return self._outer
        optimizer, state = optimizer_of(self, part), self._state(part)
        if state:
            load(optimizer, state, self._counts, self._averaged[part])
        return optimizer

    def _keep(self, part: str, optimizer: PartOptimizer) -> None:
        if part == OUTER:
            return
        tensors = self._submodule(part).state_dict()
        self.store.put(part, "weights", {f"{part}{name}": t for name, t in tensors.items()})
        self.store.put(part, "state", state_of(optimizer))
        self._counts |= optimizer.counts()
        self._averaged[part] = optimizer.averaged


def on_leaves(state: BlockState, wanted: Sequence[str]) -> tuple[BlockState, Gradients]:
    """The state as the beginning of a graph, and where the gradients of its tensors will be.

    It reads views of leaves: mixed precision keeps a cast of a leaf for all its readers, whose
    gradients would then be summed in that precision. And gradients are taken before they reach the
    leaves, which would put them into a memory layout of their own; products of other layouts may
    round differently.
    """
    tensors = {name: getattr(state, name) for name in wanted if getattr(state, name) is not None}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    views = {name: leaf.view_as(leaf) for name, leaf in leaves.items()}
    gradients: Gradients = {}
    for name, view in views.items():
        view.register_hook(partial(gradients.__setitem__, name))
    return replace(state, **views), gradients


def backward(state: BlockState, gradients: Gradients) -> None:
    """From the gradients of a state's tensors to those of what they were made of."""
    roots = [
        (getattr(state, name), gradient)
        for name, gradient in gradients.items()
        if getattr(state, name).requires_grad
    ]
    torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
