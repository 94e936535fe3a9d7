"""Blocks built of parameters that are in training: whatever stands at a place shares its tensors
with the parts.

The same student stands in a chain plain or projected, and the same projection on one step's chain
and not on the next one's, so blocks are put together for every step, and gradients reach the one
set of parts behind them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
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

MakeBlock = Callable[[], nn.Module]


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
    ):
        super().__init__()
        self.architecture = architecture
        self.students = nn.ModuleDict(
            {i.name: students.student(i, torch.float32, device) for i in plan.intervals_of(variant)}
        )
        self.projections = nn.ModuleDict(
            {
                f"{place}:{kind}": _linears(students.projection(place, kind, torch.float32, device))
                for place, kind in projections_of(plan, variant)
            }
        )

    def blocks(self, layout: Layout, teacher: Teacher) -> list[MakeBlock]:
        """One a place: makes the block when its turn comes (also again, when it is computed a
        second time)."""
        shared: dict[int, SharedText] = {}
        return [partial(self.block, place, teacher, shared) for place in layout.places]

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
        # a state_dict would take sharded tensors apart while they are in use
        return dict(self.projections[f"{place}:{kind}"].named_parameters())


def student_part(interval: str) -> str:
    """The prefix of a student's tensors in `TrainableParts`."""
    return f"students.{interval}."


def projection_part(place: str, kind: str) -> str:
    """The same of a projection's."""
    return f"projections.{place}:{kind}."


def parts_at(place: Place) -> tuple[str, ...]:
    """The parts that a place's block is made of."""
    student = (student_part(place.name),) if place.interval else ()
    return (*student, *(projection_part(place.name, kind) for kind in place.projections))


def part_tensors(
    plan: PruningPlan, students: Students, part: str, device: str
) -> dict[str, torch.Tensor]:
    """A part's tensors, as training begins."""
    family, name = part.rstrip(".").split(".")
    if family == "students":
        return students.student(plan.interval(name), torch.float32, device).state_dict()
    place, kind = name.split(":")
    return students.projection(place, kind, torch.float32, device)


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
    blocks: Iterable[MakeBlock],
    state: BlockState,
    checkpointing: bool,
    bits: str = NONE,
) -> BlockState:
    """The state behind the last block. Checkpointed: a block is made and run again for its
    gradients. bits: what weights in training are rounded to."""
    for make in blocks:
        run = partial(run_block_made, architecture, make, bits=bits)
        state = checkpoint(run, state, use_reentrant=False) if checkpointing else run(state)
    return state


def run_block_made(
    architecture: Architecture, make: MakeBlock, state: BlockState, bits: str = NONE
) -> BlockState:
    with torch.enable_grad():  # else cuts of what is in training would not be known as such
        made = make()
    with quantised_in_training(made, bits) as block:
        return architecture.run_block(block, state)


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
