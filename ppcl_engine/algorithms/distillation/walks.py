"""How a step of polish or finetune gets to its gradients: through a chain of blocks that are all in
memory (here), one block at a time (`streamed_walk`), or with its blocks divided among processes
(`sharded_walk`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ...architectures import Architecture, BlockState
from ...models.streaming import StateStore, Teacher, mixed_precision
from .part_optimizer import PartOptimizer
from .quantization import NONE
from .saved_training import AVERAGE, SavedParts
from .sharding import like
from .trainable import MakeBlock, run_made

OUTER = ""
"""the part that begins and ends a chain: the outer layers"""


@dataclass(frozen=True, kw_only=True)
class ChainBlock:
    """A block of a chain."""

    make: MakeBlock
    parts: tuple[str, ...] = ()
    """the parts in training that it is made of; each is in one block of a chain only, since places
    have names of their own"""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What one step runs, from its batch to its loss."""

    teacher: Teacher
    outer: nn.Module
    """whose final layer gives the velocity"""
    trains_outer: bool
    begin: Callable[[], BlockState]
    """the state in front of the first of these blocks"""
    blocks: Sequence[ChainBlock]
    error: Callable[[torch.Tensor], torch.Tensor]
    """velocity -> loss"""
    bits: str = NONE
    """what weights in training are rounded to"""

    @property
    def parts(self) -> list[str]:
        outer = [OUTER] if self.trains_outer else []
        return [*outer, *(part for block in self.blocks for part in block.parts)]

    def velocity(self, checkpointing: bool = False) -> torch.Tensor:
        """[n, image_tokens, channels], in the teacher's precision."""
        architecture = self.teacher.architecture
        with mixed_precision(self.teacher):
            blocks = [block.make for block in self.blocks]
            state = run_made(architecture, blocks, self.begin(), checkpointing, self.bits)
            return architecture.finish(self.outer, state)

    def loss(self, checkpointing: bool = False) -> torch.Tensor:
        return self.error(self.velocity(checkpointing))


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How parts are trained."""

    weight_decay: float
    ema: float
    compact: bool = False
    """moments in 8 bits and averages in bfloat16 between steps"""


class Walk(Protocol):
    """Where the parts in training are, and how a step gets to their gradients."""

    @property
    def module(self) -> nn.Module:
        """All parts; what is not in memory is on the meta device."""
        ...

    @property
    def names(self) -> Mapping[str, Sequence[str]]:
        """Part -> its tensors."""
        ...

    @property
    def rules(self) -> Rules: ...

    @property
    def folder(self) -> Path | None:
        """Where files are that only this walk reads."""
        ...

    def loss(self, chain: Chain) -> torch.Tensor: ...

    def gradients(self) -> Iterator[PartOptimizer]:
        """Each part of the last loss's chain, once its gradient is complete. What the caller
        does to a part is kept."""
        ...

    def filled(self, parts: Iterable[str]) -> AbstractContextManager[None]:
        """Meanwhile these parts' weights are in the module."""
        ...

    def at_hand(self, part: str, last: bool = False) -> AbstractContextManager[PartOptimizer]:
        """A part with all that belongs to it. last: until a save, whose file has it then."""
        ...

    def counts(self) -> dict[str, float]:
        """Updates of each parameter."""
        ...

    def go_on_from(self, saved: SavedParts, step: int) -> None: ...

    def was_saved(self, saved: SavedParts, step: int) -> None:
        """All parts are in this file."""
        ...

    def use_averages(self) -> None:
        """From now on the module's weights are the averaged ones; training has ended."""
        ...

    def close(self) -> None:
        """Removes files that only this walk reads."""
        ...


class ResidentWalk:
    """All parts, their moments and their averages stay on the device."""

    def __init__(
        self, module: nn.Module, parts: Sequence[str], rules: Rules, checkpointing: bool = False
    ):
        self.module, self.rules, self.folder = module.requires_grad_(True), rules, None
        self.checkpointing, self.names = checkpointing, names_by_part(module, parts)
        self.optimizers = {part: optimizer_of(self, part) for part in self.names}

    def loss(self, chain: Chain) -> torch.Tensor:
        self._parts, self._loss = chain.parts, chain.loss(self.checkpointing)
        return self._loss

    def gradients(self) -> Iterator[PartOptimizer]:
        self._loss.backward()
        del self._loss
        yield from (self.optimizers[part] for part in self._parts)

    def filled(self, parts: Iterable[str]) -> AbstractContextManager[None]:
        return nullcontext()

    def at_hand(self, part: str, last: bool = False) -> AbstractContextManager[PartOptimizer]:
        return nullcontext(self.optimizers[part])

    def counts(self) -> dict[str, float]:
        return {
            n: c for optimizer in self.optimizers.values() for n, c in optimizer.counts().items()
        }

    @torch.no_grad()
    def go_on_from(self, saved: SavedParts, step: int) -> None:
        for part, optimizer in self.optimizers.items():
            weights = saved.weights(part)
            for name, parameter in optimizer.parameters.items():
                parameter.copy_(like(weights[name], parameter))
            load(optimizer, saved.state(part), saved.counts, step)

    def was_saved(self, saved: SavedParts, step: int) -> None:
        pass

    @torch.no_grad()
    def use_averages(self) -> None:
        for optimizer in self.optimizers.values():
            for name, parameter in optimizer.parameters.items():
                parameter.copy_(optimizer.used()[name])

    def close(self) -> None:
        pass


def names_by_part(module: nn.Module, parts: Sequence[str]) -> dict[str, list[str]]:
    """Part, a prefix of names -> the module's tensors; OUTER has all that is in no other part."""
    names: dict[str, list[str]] = {part: [] for part in parts}
    found = sorted(parts, key=lambda part: part == OUTER)
    for name in module.state_dict():
        names[next(part for part in found if name.startswith(part))].append(name)
    return names


def optimizer_of(walk: Walk, part: str) -> PartOptimizer:
    """A part's, of parameters that are in the module, as before its first step."""
    owner, rules = part_of(walk.module, part), walk.rules
    named = {f"{part}{name}": parameter for name, parameter in owner.named_parameters()}
    parameters = {name: named[name] for name in walk.names[part] if name in named}
    return PartOptimizer(parameters, rules.weight_decay, rules.ema, rules.compact)


def part_of(module: nn.Module, part: str) -> nn.Module:
    """The sub-module that a part's names begin with; of OUTER the whole."""
    return module.get_submodule(part.rstrip("."))


def load(
    optimizer: PartOptimizer, state: dict[str, torch.Tensor], counts: dict[str, float], step: int
) -> None:
    """What belongs to a part beside its weights, as it was at a step."""
    optimizer.load_moments(state, counts)
    for name, parameter in optimizer.parameters.items() if optimizer.ema else ():
        optimizer.average[name] = like(state[f"{AVERAGE}{name}"], parameter)
    optimizer.averaged = step


def state_of(optimizer: PartOptimizer) -> dict[str, torch.Tensor]:
    averages = {f"{AVERAGE}{name}": tensor for name, tensor in optimizer.average.items()}
    return {**optimizer.moments(), **averages}


def walked_blocks(walk: Walk, blocks: Iterable[ChainBlock]) -> Iterator[nn.Module]:
    """Each block with its weights, while the caller has it."""
    for block in blocks:
        with walk.filled(block.parts):
            yield block.make()


@torch.no_grad()
def velocities(
    architecture: Architecture,
    outer: nn.Module,
    blocks: Iterable[nn.Module],
    states: Iterable[BlockState],
    folder: Path | None,
) -> list[torch.Tensor]:
    """The velocity behind each of the embedded states; each block is made once, for all of them.
    folder: where states wait; None: in the host's memory."""
    store, first = StateStore(folder, rest="cpu"), list(states)
    for row, state in enumerate(first):
        store.put("chain", row, state)
    for block in blocks:
        for row, state in enumerate(first):
            after = architecture.run_block(block, store.get("chain", row, state))
            store.put("chain", row, after)
    found = [
        architecture.finish(outer, store.get("chain", row, state))
        for row, state in enumerate(first)
    ]
    store.clear()
    return found
