"""A training divided among processes: each holds its rows of every weight, gradient, moment and
average (FSDP2, torch's `fully_shard`), and its rows of every batch.

What stands at one place of the model, a student with its projections or a block, is a unit: its
tensors are gathered for the time of its forward, and again for that of its backward, and its
gradients are summed into the shards at once. FSDP2 works by hooks on a module's call, but blocks
are put together for every step out of tensors that other modules own. So a unit is a module of its
own that holds those modules and is called with the work that is to be done while they are
gathered; whatever that work makes of the gathered tensors (views, copies of a block's structure,
rounded weights), gradients come to the unit. The root unit holds what is outside of blocks, and
stays gathered from the beginning of a step to its end.

Nothing that is trained is kept whole. The teacher's frozen blocks are: each process has them, or
reads them one by one. Weights are gathered in float32, as they are trained. Without checkpointing,
what mixed precision or --quant-aware makes of them is kept whole until a block's backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from ...architectures import BlockState
from ...architectures.modules import AnyModule
from ...system.distributed import processes
from ...system.tensor_files import TensorEntry, write_tensor_stream

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

LEAST = 1e-6  # as torch's clip_grad_norm_ has it

Result = TypeVar("Result")
Work = Callable[[BlockState], BlockState]


class Units:
    """The units of a training. Here those of one process, where nothing is divided."""

    def __init__(self, device: str):
        self.device_of_parts = device
        """where modules are made that are then added"""

    def add(self, name: str, modules: Iterable[nn.Module]) -> None:
        """Divides the tensors of these modules, which are used together; moves their parts to the
        training's device."""

    def finish(self, module: nn.Module) -> None:
        """Divides the rest of the module that all units are parts of."""

    def within(self, name: str) -> Callable[[Work, BlockState], BlockState]:
        """What runs a work on a state while that unit's tensors are gathered."""
        return at_once

    def step(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """work(), in which units are used, and which returns what gradients begin from."""
        return work()


class ShardedUnits(Units):
    """The units of several processes, each of which holds its part of them."""

    def __init__(self, device: str):
        from torch.distributed import fsdp
        from torch.distributed.device_mesh import init_device_mesh

        if not hasattr(getattr(fsdp, "FSDPModule", None), "set_force_sum_reduction_for_comms"):
            raise ValueError(
                f"--parallel shard needs a newer torch than {torch.__version__}; update it, or use --parallel data"
            )
        super().__init__("cpu")
        self.kind = device.split(":")[0]
        self.mesh = init_device_mesh(self.kind, (processes().count,))
        self.units: dict[str, AnyModule] = {}
        self.root: AnyModule = None

    def add(self, name: str, modules: Iterable[nn.Module]) -> None:
        self.units[name] = self._sharded(_Unit(modules), set())

    def finish(self, module: nn.Module) -> None:
        units = nn.ModuleList(self.units.values())
        self.root = self._sharded(_Unit([module, units]), set(units.parameters()))

    def within(self, name: str) -> Callable[[Work, BlockState], BlockState]:
        return partial(_run, self.units[name]) if name in self.units else at_once

    def step(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        # its cache would keep a copy of every weight from its use to the end of the forward
        with torch.autocast(
            self.kind,
            torch.get_autocast_dtype(self.kind),
            torch.is_autocast_enabled(self.kind),
            cache_enabled=False,
        ):
            return self.root(_begun, work)

    def _sharded(self, unit: nn.Module, others: set[nn.Parameter]) -> AnyModule:
        from torch.distributed.fsdp import fully_shard

        unit.requires_grad_(True)
        sharded = fully_shard(unit, mesh=self.mesh, ignored_params=others)
        # losses are of this process's rows, so that gradients add up to the whole batch's
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        return sharded


class _Unit(nn.Module):
    """Modules whose tensors are gathered while this one is called."""

    def __init__(self, modules: Iterable[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, call: Callable[..., Result], *arguments) -> Result:
        return call(*arguments)


def at_once(work: Work, state: BlockState) -> BlockState:
    return work(state)


def _run(unit: AnyModule, work: Work, state: BlockState) -> BlockState:
    """What a unit only passes on goes around it: FSDP2 would make views of it."""
    read: list[bool] = []
    return replace(state, **unit(_changes, work, _passed(_DropUnread, read, state), read))


def _changes(work: Work, state: BlockState, read: list[bool]) -> dict[str, torch.Tensor]:
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


def _begun(work: Callable[[], torch.Tensor]) -> torch.Tensor:
    return _owned(work())


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """FSDP2's hook on a view would be lost when something is written into it."""
    return tensor.clone() if tensor._is_view() else tensor


def units_on(device: str) -> Units:
    """The units of a training on this device: sharded where several processes share its weights."""
    return ShardedUnits(device) if processes().shards else Units(device)


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of it."""
    return _shard(tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, gathered if it is sharded; then all processes have to call this."""
    return _shard(tensor).full_tensor() if is_sharded(tensor) else tensor


def like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, as the other one is: its shard, type and device."""
    if not is_sharded(other):
        return tensor.to(other)
    from torch.distributed.tensor import distribute_tensor

    shard, tensor = _shard(other), tensor.to(local(other))
    # every process has all of it, so nothing is sent
    return distribute_tensor(tensor, shard.device_mesh, shard.placements, src_data_rank=None)


def clip(parameters: Iterable[nn.Parameter], most: float = 1.0) -> float:
    """The norm of all these gradients together, which are then scaled down to `most`. Of sharded
    ones all processes have to call this for the same parameters; one number is exchanged."""
    trained = list(parameters)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    if not any(map(is_sharded, gradients)):
        return float(nn.utils.clip_grad_norm_(trained, most))
    shards = [local(gradient) for gradient in gradients]
    norm = processes().sum(nn.utils.get_total_norm(shards).square()).sqrt()
    scale = (most / (norm + LEAST)).clamp(max=1.0)
    for shard in shards:
        shard.mul_(scale)
    return float(norm)


def write_whole(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A file of the whole tensors, which the main process writes: each is gathered when its turn
    comes. All processes have to call this where some are sharded."""
    entries = [
        TensorEntry(name, t.dtype, tuple(t.shape), partial(whole, t)) for name, t in tensors.items()
    ]
    if processes().writes:
        write_tensor_stream(path, entries, metadata)
        return
    for tensor in tensors.values():
        whole(tensor)


def _shard(tensor: torch.Tensor) -> DTensor:
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor
