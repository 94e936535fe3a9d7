"""Blocks built of parameters that are in training: whatever stands at a place shares its tensors
with the parts.

The same student stands in a chain plain or projected, and the same projection on one step's chain
and not on the next one's, so blocks are put together for every step, and gradients reach the one
set of parts behind them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...architectures import Architecture, BlockState, SharedText
from ...architectures.modules import AnyModule
from ...models.assembly import Students
from ...models.layout import Layout, Place, projections_of
from ...models.streaming import Teacher
from ...models.surgery import project, projection_modules
from ...plan import PruningPlan, Variant
from .quantization import NONE, quantised_in_training
from .sharding import Units, Work, at_once


@dataclass(frozen=True)
class PlacedBlock:
    """What stands at a place in one step."""

    make: Callable[[], nn.Module]
    """puts it together when its turn comes, and again when it is computed a second time"""
    within: Callable[[Work, BlockState], BlockState] = at_once
    """runs a work on a state while the tensors that it is made of are gathered"""


class TrainableParts(nn.Module):
    """The students and projections of a variant in float32: `students.<interval>`,
    `projections.<place>:<kind>`.

    Projections of every block that can stand at a site's place are there, as any subset may be
    switched on.
    """

    def __init__(
        self,
        plan: PruningPlan,
        variant: Variant,
        architecture: Architecture,
        students: Students,
        device: str,
        units: Units | None = None,
    ):
        super().__init__()
        self.architecture, self.units = architecture, units or Units(device)
        intervals = {interval.name: interval for interval in plan.intervals_of(variant)}
        projected, parts = projections_of(plan, variant), {}
        for name in dict.fromkeys([*intervals, *(place for place, _ in projected)]):
            own: dict[str, nn.Module] = {}
            if name in intervals:
                own[name] = students.student(intervals[name], torch.float32, device)
            for kind in (kind for place, kind in projected if place == name):
                own[f"{name}:{kind}"] = _linears(
                    students.projection(name, kind, torch.float32, device)
                )
            self.units.add(name, own.values())
            parts |= own
        self.students = nn.ModuleDict({name: parts[name] for name in intervals})
        names = [f"{place}:{kind}" for place, kind in projected]
        self.projections = nn.ModuleDict({name: parts[name] for name in names})
        self.units.finish(self)

    def blocks(self, layout: Layout, teacher: Teacher) -> list[PlacedBlock]:
        shared: dict[int, SharedText] = {}
        return [
            PlacedBlock(partial(self.block, p, teacher, shared), self.units.within(p.name))
            for p in layout.places
        ]

    def block(self, place: Place, teacher: Teacher, shared: dict[int, SharedText]) -> nn.Module:
        block = self.students[place.name] if place.interval else teacher.block(place.index)
        if not place.projections and not place.publishes:
            return block
        built = project(self.architecture, twin(block), place, shared, self._projection)
        live = set(self.parameters())
        for kind in place.projections:
            for part, linear in projection_modules(self.architecture, built, kind).items():
                projection: AnyModule = self.projections[f"{place.name}:{kind}"]
                ours = projection[part]
                linear.weight, linear.bias = ours.weight, ours.bias
        share_cuts(built, dict(block.named_parameters()), live)
        return built

    def _projection(self, place: str, kind: str) -> dict[str, torch.Tensor]:
        # a state_dict would take the unit's tensors apart while they are in use
        return dict(self.projections[f"{place}:{kind}"].named_parameters())


def twin(block: nn.Module) -> nn.Module:
    """A block of the same structure on the very same tensors: edits of one leave the other as it
    is."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})


def share_cuts(block: AnyModule, origins: dict[str, nn.Parameter], live: set[nn.Parameter]) -> None:
    """Where projecting copied the first rows or columns of a tensor (a cut modulation), or what its
    module's `kept` says, a view of those takes the copy's place. The copy bears its origin's
    name."""
    known = live.union(origins.values())
    for name, parameter in list(block.named_parameters()):
        if parameter in known:
            continue
        path, _, leaf = name.rpartition(".")
        owner: AnyModule = block.get_submodule(path)
        origin = origins[name]
        kept = (
            owner.kept(origin)
            if hasattr(owner, "kept")
            else origin[tuple(map(slice, parameter.shape))]
        )
        assert kept.shape == parameter.shape, (name, kept.shape, parameter.shape)
        delattr(owner, leaf)
        setattr(owner, leaf, kept)


def run_made(
    architecture: Architecture,
    blocks: Iterable[PlacedBlock],
    state: BlockState,
    checkpointing: bool,
    bits: str = NONE,
) -> BlockState:
    """The state behind the last block. Checkpointed: a block is made and run again for its
    gradients. bits: what weights in training are rounded to."""
    for placed in blocks:

        def run(state: BlockState, placed: PlacedBlock = placed) -> BlockState:
            with quantised_in_training(placed.make(), bits) as block:
                return architecture.run_block(block, state)

        work = partial(checkpoint, run, use_reentrant=False) if checkpointing else run
        state = placed.within(work, state)
    return state


def _linears(state: dict[str, torch.Tensor]) -> nn.ModuleDict:
    """ "map.weight", "map.bias", ... as linear maps by part."""
    linears = nn.ModuleDict()
    for part in dict.fromkeys(name.split(".")[0] for name in state):
        rows, columns = state[f"{part}.weight"].shape
        linears[part] = nn.Linear(columns, rows, device="meta")
        linears[part].weight, linears[part].bias = (
            nn.Parameter(state[f"{part}.{n}"]) for n in ("weight", "bias")
        )
    return linears
