"""Low-rank pairs beside a block's linear maps, in training; and a block's tensors changed by a LoRA."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ...architectures.modules import AnyModule
from ...models.lora_files import LoraFile, ReadTensor
from ...models.lora_kinds import LowRank


class Pairs(nn.Module):
    """A pair for each of some linear maps of a block, all of one rank; missing directions read at
    random and write nothing yet."""

    def __init__(self, pairs: Mapping[str, LowRank], rank: int, device: str):
        super().__init__()
        self.names = tuple(pairs)
        generator = torch.Generator().manual_seed(0)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for pair in pairs.values():
            missing = rank - len(pair.down)
            columns = pair.down.shape[1]
            more = torch.randn(missing, columns, generator=generator) / columns**0.5
            nothing = torch.zeros(len(pair.up), missing)
            self.down.append(torch.cat([pair.down.cpu(), more]).to(device))
            self.up.append(torch.cat([pair.scale * pair.up.cpu(), nothing], dim=1).to(device))

    def get(self, name: str) -> LowRank:
        number = self.names.index(name)
        return LowRank(self.down[number].detach(), self.up[number].detach(), 1.0)

    def replaced(self, pairs: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """All pairs, with some of them others."""
        return {name: pairs.get(name) or self.get(name) for name in self.names}


@contextmanager
def beside(block: AnyModule, pairs: Pairs, strength: float) -> Iterator[None]:
    """Meanwhile each map returns W x + strength * up (down x)."""

    def hook(down: torch.Tensor, up: torch.Tensor) -> Callable:
        def add(module: nn.Module, arguments, output: torch.Tensor) -> torch.Tensor:
            x = arguments[0].to(output.dtype)
            inner = nn.functional.linear(x, down.to(x.dtype))
            return output + strength * nn.functional.linear(inner, up.to(x.dtype))

        return add

    parts = zip(pairs.names, pairs.down, pairs.up, strict=True)
    handles = [
        block.get_submodule(name).register_forward_hook(hook(down, up)) for name, down, up in parts
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changed(
    module: AnyModule,
    prefix: str,
    lora: LoraFile,
    strength: float,
    base: ReadTensor,
    without: Collection[str] = (),
) -> Iterator[None]:
    """Meanwhile the module's tensors are those that the LoRA makes of them; of a map that was cut,
    its part of the change.

    prefix: of the module's names in the full model. without: names in the module that stay.
    """
    targets, originals = set(lora.targets), {}
    for name, parameter in module.named_parameters():
        if name in without or prefix + name not in targets:
            continue
        change = lora.change(prefix + name, strength, base)
        assert change is not None, name
        originals[parameter] = parameter.data
        cut = _cut(module, name, change, parameter.shape).to(parameter.device)
        parameter.data = (parameter.data.float() + cut).to(parameter.dtype)
    try:
        yield
    finally:
        for parameter, data in originals.items():
            parameter.data = data


def _cut(module: AnyModule, name: str, change: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What is kept of a change where a projection left only some rows or columns of a map."""
    if change.shape == shape:
        return change
    owner: AnyModule = module.get_submodule(name.rpartition(".")[0])
    return owner.kept(change) if hasattr(owner, "kept") else change[tuple(map(slice, shape))]
