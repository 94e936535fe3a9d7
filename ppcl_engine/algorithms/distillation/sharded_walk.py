"""A step of polish or finetune whose parts are divided among processes: each holds its rows of every
weight, gradient, moment and average (FSDP2, torch's `fully_shard`), and its rows of every batch.

What stands at one place of the model, a student with its projections or a block, is a unit: its
tensors are gathered for the time of its forward, and again for that of its backward, and its
gradients are summed into the shards at once. FSDP2 works by hooks on a module's call, but blocks
are put together for every step out of tensors that other modules own. So a unit is a module of its
own that holds those modules and is called with the work that is to be done while they are
gathered; whatever that work makes of the gathered tensors (views, copies of a block's structure,
rounded weights), gradients come to the unit. The root unit holds the outer layers, and stays
gathered from the beginning of a step to its end.

Nothing that is trained is kept whole. The teacher's frozen blocks are: each process has them, or
reads them one by one. Weights are gathered in float32, as they are trained. Without checkpointing,
what mixed precision or --quant-aware makes of them is kept whole until a block's backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from ...architectures import BlockState
from ...architectures.modules import AnyModule
from ...models.streaming import mixed_precision
from ...system.distributed import processes
from .part_store import Tensors
from .trainable import run_made
from .walks import OUTER, Chain, ChainBlock, ResidentWalk, Rules

Result = TypeVar("Result")
Work = Callable[[BlockState], BlockState]


class ShardedWalk(ResidentWalk):
    """Each process keeps its part of all parts on its device.

    module, begin: as StreamedWalk has them. places: the parts that stand at one place together.
    """

    def __init__(
        self,
        module: nn.Module,
        places: Iterable[Sequence[str]],
        rules: Rules,
        begin: Callable[[str], Tensors],
        device: str,
        checkpointing: bool = False,
    ):
        from torch.distributed.device_mesh import init_device_mesh

        places = list(places)
        self.mesh = init_device_mesh(device.split(":")[0], (processes().count,))
        self.units: dict[str, AnyModule] = {}
        """part -> the unit that it is in"""
        for parts in places:
            if OUTER not in parts:
                unit = self._sharded(_Unit(_filled(module, part, begin) for part in parts))
                self.units |= dict.fromkeys(parts, unit)
        units = nn.ModuleList(dict.fromkeys(self.units.values()))
        self.root = self._sharded(_Unit([module, units]), set(units.parameters()))
        super().__init__(module, [part for parts in places for part in parts], rules, checkpointing)

    def loss(self, chain: Chain) -> torch.Tensor:
        velocity = self.root(_owned_result, partial(self._velocity, chain))
        self._parts, self._loss = chain.parts, chain.error(velocity)
        return self._loss

    @contextmanager
    def filled(self, parts: Iterable[str]) -> Iterator[None]:
        units = dict.fromkeys(self.units.get(part, self.root) for part in parts)
        for unit in units:
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()

    def _velocity(self, chain: Chain) -> torch.Tensor:
        architecture = chain.teacher.architecture
        # a cache would keep a copy of every gathered weight to the end of the forward
        with mixed_precision(chain.teacher, cache=False):
            state = chain.begin()
            for block in chain.blocks:
                run = partial(run_made, architecture, [block.make])
                work = partial(run, checkpointing=self.checkpointing, bits=chain.bits)
                state = self._within_unit(block, work, state)
            return architecture.finish(chain.outer, state)

    def _within_unit(self, block: ChainBlock, work: Work, state: BlockState) -> BlockState:
        """What the unit only passes on goes around it: FSDP2 would make views of it."""
        if not block.parts:
            return work(state)
        unit, read = self.units[block.parts[0]], []
        return replace(state, **unit(_changes, work, _passed(_DropUnread, read, state), read))

    def _sharded(self, unit: nn.Module, others: set[nn.Parameter] | None = None) -> AnyModule:
        from torch.distributed.fsdp import fully_shard

        unit.requires_grad_(True)
        sharded = fully_shard(unit, mesh=self.mesh, ignored_params=others)
        # losses are of this process's rows, so that gradients add up to the whole batch's
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        return sharded


def check_torch() -> None:
    from torch.distributed import fsdp

    if not hasattr(getattr(fsdp, "FSDPModule", None), "set_force_sum_reduction_for_comms"):
        raise ValueError(
            f"--parallel shard needs a newer torch than {torch.__version__}; update it, or use --parallel data"
        )


def _filled(module: nn.Module, part: str, begin: Callable[[str], Tensors]) -> nn.Module:
    """A part's sub-module, no longer on the meta device."""
    submodule = module.get_submodule(part.rstrip("."))
    submodule.load_state_dict(begin(part), assign=True)
    return submodule


class _Unit(nn.Module):
    """Modules whose tensors are gathered while this one is called."""

    def __init__(self, modules: Iterable[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, call: Callable[..., Result], *arguments) -> Result:
        return call(*arguments)


def _changes(work: Work, state: BlockState, read: list[bool]) -> Tensors:
    state = _passed(_NoteUnread, read, state)
    after = work(state)
    named = {field.name: getattr(after, field.name) for field in fields(after)}
    changed = {n: value for n, value in named.items() if value is not getattr(state, n)}
    return {name: _owned(value) for name, value in changed.items()}


def _passed(
    function: type[_NoteUnread | _DropUnread], read: list[bool], state: BlockState
) -> BlockState:
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    tensors = {n: v for n, v in values.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    if not tensors:
        return state
    passed = function.apply(read, *tensors.values())
    return replace(state, **dict(zip(tensors, passed, strict=True)))


class _NoteUnread(torch.autograd.Function):
    """FSDP2 makes zeros of gradients that are not there, and a weight with a gradient of zeros would
    decay. So inside of a unit it is noted which are there, and outside the others are dropped."""

    @staticmethod
    def forward(context, read: list[bool], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        context.set_materialize_grads(False)
        context.read = read
        return tensors

    @staticmethod
    def backward(context, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        context.read[:] = [gradient is not None for gradient in gradients]
        return None, *gradients


class _DropUnread(_NoteUnread):
    @staticmethod
    def backward(context, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        pairs = zip(gradients, context.read, strict=True)
        return None, *(gradient if read else None for gradient, read in pairs)


def _owned_result(work: Callable[[], torch.Tensor]) -> torch.Tensor:
    return _owned(work())


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """FSDP2's hook on a view would be lost when something is written into it."""
    return tensor.clone() if tensor._is_view() else tensor
