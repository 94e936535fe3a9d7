"""`Structure`: which block of the teacher stands where in a model that is built, and by which names
files hold its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ...ppcl_engine.architectures import Architecture
from ...ppcl_engine.architectures.base import modulation_names
from ...ppcl_engine.architectures.folded import Folding
from ...ppcl_engine.models.layout import Layout
from ...ppcl_engine.models.standalone import GUARD_SHAPE
from ...ppcl_engine.models.stored_layout import text_in
from ...ppcl_engine.models.weights import parts_in, usual_name
from ...ppcl_engine.plan import Interval, PruningPlan, WidthSite
from .base import Host

# of a model that the host builds, several times as many as any known model has: a hostile file must
# not make it build a million
MOST_HOST_BLOCKS = 256
AXES = "axes_dims_rope"
STUDENT = "student."

FileTensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Structure:
    """What the tensors of a file make."""

    host: Host
    layout: Layout
    """what is built"""
    config: dict
    """the engine's configuration of the whole teacher"""
    plan: PruningPlan | None = None
    """that our own files carry"""
    switchable: bool = False
    """whether the teacher's blocks and all students are there, so that variants can be switched"""
    names: dict[str, str | None] = field(default_factory=dict)
    """stored name -> name in the host's model, where they differ; None: nothing reads the tensor"""
    legacy: frozenset[str] = frozenset()
    """names of the text projections that are stored as P instead of P - 1"""
    folding: Folding | None = None
    """what stands for the modulations, where they are folded"""

    def prefix(self, index: int) -> str:
        return self.host.prefix(self.config, index)

    def block(self, transformer: nn.Module, index: int) -> nn.Module:
        return transformer.get_submodule(self.prefix(index).rstrip("."))

    def renamed(self, tensors: FileTensors) -> dict[str, torch.Tensor]:
        """The tensors of a file by their names in the model that is built."""
        renamed = {}
        for name, tensor in ((shown(name), tensor) for name, tensor in tensors.items()):
            new = self.names.get(name, name)
            if new is not None and not is_surrounding(name) and tuple(tensor.shape) != GUARD_SHAPE:
                new = usual_name(self.host.engine, new)
                renamed[new] = _without_identity(tensor) if name in self.legacy else tensor
        return renamed | self._zero_biases(renamed)

    def _zero_biases(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Biases for folded tables, whose values contain the real ones: a LoRA needs a bias to
        change."""
        if self.folding is None or self.folding.form != "table":
            return {}
        tables = {
            name: tensors[f"{name}.weight"] for name in modulation_names(tensors, self.host.engine)
        }
        return {f"{name}.bias": table.new_zeros(len(table)) for name, table in tables.items()}


def hidden(tensors: FileTensors) -> dict[str, torch.Tensor]:
    """The tensors for the host's loader, students under names outside of all blocks: the loader
    counts blocks by the names of tensors, and would misread a student inside a block."""
    return {
        f"{STUDENT}{name.replace(f'.{STUDENT}', '.', 1)}" if f".{STUDENT}" in name else name: tensor
        for name, tensor in tensors.items()
    }


def shown(name: str) -> str:
    """The inverse of `hidden`, for one name."""
    if not name.startswith(STUDENT):
        return name
    blocks, number, part = name.removeprefix(STUDENT).split(".", 2)
    return f"{blocks}.{number}.{STUDENT}{part}"


def is_surrounding(name: str) -> bool:
    """Whether a tensor is not the transformer's: our own marks, and the text encoder and VAE that
    the bundled teacher brings along."""
    return name.startswith(("ppcl_", "text_encoder.", "vae."))


def _without_identity(tensor: torch.Tensor) -> torch.Tensor:
    if hasattr(tensor, "changed"):  # a matrix of few bits
        return tensor.changed(_without_identity)
    return (tensor.float() - torch.eye(len(tensor), device=tensor.device)).to(tensor.dtype)


def config_of(host: Host, tensors: FileTensors, known: Mapping | None = None) -> dict:
    """The engine's configuration, from shapes and marks. `known` gives, where it has them, the
    entries that no shape shows: numbers of blocks, sizes of the rotary axes and the like."""
    shapes, marks = engine_shapes(host.engine, tensors), host.engine.marks
    config = host.engine.infer_config(
        shapes.__getitem__, [*shapes, *(mark for mark in marks if mark in tensors)]
    )
    entries = (*(blocks.depth for blocks in host.lists), AXES, *marks.values(), *host.told)
    told = {key: known[key] for key in entries if known and key in known}
    axes = told.get(AXES, config.get(AXES))
    if AXES in config and (not isinstance(axes, list) or sum(axes) != config["attention_head_dim"]):
        raise ValueError(
            f"rotary axes {axes} do not add up to a head of {config['attention_head_dim']}; is the file complete?"
        )
    return {**config, **told}


def engine_shapes(engine: Architecture, tensors: FileTensors) -> dict[str, tuple[int, ...]]:
    """Shapes by diffusers' names, of tensors by the host's names."""
    parts = parts_in(engine, (name for name in tensors if name not in engine.marks))
    return {key: part.shape(tuple(tensors[part.name].shape)) for key, part in parts.items()}


def blocks_in(host: Host, names: Iterable[str]) -> dict[str, list[int]]:
    """Name of a list -> the numbers of the blocks in it that have tensors."""
    by_list: dict[str, set[int]] = {blocks.name: set() for blocks in host.lists}
    for match in map(host.block_name.match, names):
        if match:
            by_list[match[1]].add(int(match[2]))
    return {name: sorted(numbers) for name, numbers in by_list.items()}


def count_blocks(host: Host, names: Iterable[str]) -> int:
    return sum(map(len, blocks_in(host, names).values()))


def checked_plan(host: Host, plan: PruningPlan) -> PruningPlan:
    """The plan, checked before a model is built by it: a file may come from anywhere. Raises
    ValueError for one that does not fit the architecture or names absurd sizes."""
    if plan.architecture != host.engine.name:
        raise ValueError(
            f"the file's plan is for {plan.architecture}, but its tensors are of {host.engine.name}; export it again"
        )
    counts = [plan.config.get(blocks.depth) for blocks in host.lists]
    whole = (
        all(type(count) is int and count >= 0 for count in counts)
        and sum(counts) == plan.num_blocks
    )
    if not whole or not 0 < plan.num_blocks <= MOST_HOST_BLOCKS:
        raise ValueError(
            f"the file's plan names {plan.num_blocks} blocks, its configuration {' + '.join(map(str, counts))}; "
            f"they must agree, from 1 to {MOST_HOST_BLOCKS}: export the file again"
        )
    for interval in plan.intervals:
        rank = interval.correction
        if rank not in ("none", "affine") and not (str(rank).isdecimal() and 0 < int(rank) <= 4096):
            raise ValueError(
                f"interval {interval.name}: correction {rank!r} is not none, affine or a rank"
            )
    return plan


def plan_of_layout(host: Host, config: dict, layout: Layout) -> PruningPlan:
    """A plan for a model whose file carries none: a block stands for those missing behind it."""
    starts = [place.index for place in layout.places]
    lasts = [*(start - 1 for start in starts[1:]), layout.num_blocks - 1]
    sites = [site for place in layout.places for site in place.ffn]
    for place, last in zip(layout.places, lasts, strict=True):
        if place.text_source is not None:
            sites += [WidthSite(block=block, kind="text") for block in range(place.index, last + 1)]
    spans = zip(starts, lasts, strict=True)
    return PruningPlan(
        architecture=host.engine.name,
        config=config,
        num_blocks=layout.num_blocks,
        fingerprint="",
        intervals=tuple(Interval(first=first, last=last) for first, last in spans if last > first),
        sites=tuple(sites),
    )


def text_of(tensor: torch.Tensor) -> str:
    try:
        return text_in(tensor)
    except ValueError:
        raise ValueError("the file's plan is not readable; export it again") from None
