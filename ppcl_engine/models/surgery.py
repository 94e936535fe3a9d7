"""Edits to a model: students for intervals, corrections behind them, projections, pass-through
blocks for gaps.

A pruned model keeps the teacher's indices: where an interval was replaced, its first place holds
the student and the others hold weightless pass-through blocks. So LoRA names and ControlNet depth
need no translation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..architectures import Architecture, SharedText
from ..architectures.modules import AnyModule
from ..plan import Interval
from .filling import check_shape
from .layout import Layout, Place

JOINT = ("joint",)  # what blocks return that run both streams as one tensor
Edit = Callable[[nn.Module], nn.Module]
Projections = Callable[[str, str], dict[str, torch.Tensor]]
"""(place's name, site kind) -> the tensors of its projection, named as in `projection_state`"""


class Correction(nn.Module):
    """y = x + W x + b on each stream that is used, W full or of low rank; starts as the identity.

    Why: a copied first block gives the state after one block; a least-squares affine map brings
    it to the state after the interval (no training: error 0.26 against 1.12 in a trial).
    """

    def __init__(self, width: int, streams: tuple[str, ...], rank: int | None = None):
        super().__init__()
        self.maps = nn.ModuleDict({stream: _map(width, rank) for stream in streams})
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def correct(self, stream: str, x: torch.Tensor) -> torch.Tensor:
        return x + self.maps[stream](x) if stream in self.maps else x


def _map(width: int, rank: int | None) -> nn.Module:
    if rank is None:
        return nn.Linear(width, width)
    return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))


def add_correction(block: AnyModule, correction: Correction, returns: tuple[str, ...]) -> AnyModule:
    """Applies the correction to what the block returns.

    It is a part of the block and a hook on it, not a module around it, so that the block's tensors
    keep the names that LoRA files use.
    """

    block.correction = correction
    block.register_forward_hook(_correct_joint if returns == JOINT else partial(_correct, returns))
    return block


def _correct(
    returns: tuple[str, ...], module: AnyModule, arguments, outputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    return tuple(module.correction.correct(s, x) for s, x in zip(returns, outputs, strict=True))


def _correct_joint(module: AnyModule, arguments, output: torch.Tensor) -> torch.Tensor:
    """Image and text are corrected each by itself, whichever comes first."""
    start, stop, _ = module.image_tokens.indices(output.shape[1])
    parts = [
        ("text", output[:, :start]),
        ("image", output[:, start:stop]),
        ("text", output[:, stop:]),
    ]
    corrected = [module.correction.correct(s, x) for s, x in parts if x.shape[1]]
    return torch.cat(corrected, dim=1)


class PassThrough(nn.Module):
    """Stands where a block was dropped; takes and returns what the architecture's blocks do."""

    def __init__(self, arguments: dict[str, str], returns: tuple[str, ...]):
        super().__init__()
        self.order = list(arguments.values())
        self.returned = [arguments[stream] for stream in returns]

    def forward(self, *arguments, **named):
        named |= dict(zip(self.order, arguments, strict=False))
        if len(self.returned) == 1:
            return named[self.returned[0]]
        return tuple(named[name] for name in self.returned)


def interval_streams(
    architecture: Architecture, config: dict, interval: Interval
) -> tuple[str, ...]:
    """The streams that any later block reads."""
    return architecture.used_streams(config, interval.last)


def build_student(architecture: Architecture, config: dict, interval: Interval) -> nn.Module:
    """An empty student of the interval's form: a plain block, or one with a correction."""
    block = architecture.build_block(config, interval.first)
    if interval.correction == "none":
        return block
    rank = None if interval.correction == "affine" else int(interval.correction)
    streams = interval_streams(architecture, config, interval)
    correction = Correction(architecture.width(config), streams, rank)
    return add_correction(block, correction, architecture.block_returns)


def filled_student(
    architecture: Architecture,
    config: dict,
    interval: Interval,
    state: dict[str, torch.Tensor],
    where: Path | str = "the file",
) -> nn.Module:
    """A student with these tensors, for inference. Raises ValueError when they are not its
    tensors."""
    with torch.device("meta"):
        student = build_student(architecture, config, interval)
    expected = student.state_dict()
    wrong = sorted(expected.keys() ^ state.keys())
    if wrong:
        raise ValueError(
            f"{where}: student {interval.name}: tensor {wrong[0]} is missing or unexpected; the file does not match its "
            "plan: run distill-depth again"
        )
    for name, tensor in state.items():
        check_shape(f"student {interval.name}: {name}", tensor.shape, expected[name].shape, where)
    student.load_state_dict(state, assign=True)
    return student.eval().requires_grad_(False)


def project(
    architecture: Architecture,
    block: AnyModule,
    place: Place,
    shared: dict[int, SharedText],
    projections: Projections | None = None,
) -> nn.Module:
    """Puts the place's projections into the block, which is changed. Without `projections` they
    have no values yet.

    `shared`: where a text group's source leaves its modulated text, by the source's index.
    """
    for site in place.ffn:
        architecture.project_ffn(block, site.kind, site.form)
    if place.text_source is not None:
        source = shared.setdefault(place.text_source, SharedText())
        architecture.project_text(block, source, place.steps_text)
        if hasattr(block, "correction") and "text" in block.correction.maps:
            del block.correction.maps[
                "text"
            ]  # the group moves the text on; blocks inside it do not
    if place.publishes:
        architecture.publish_text(block, shared.setdefault(place.index, SharedText()))
    if projections is not None:
        for kind in place.projections:
            fill_projection(architecture, block, kind, projections(place.name, kind), place.name)
    return block


def projection_modules(
    architecture: Architecture, block: nn.Module, kind: str
) -> dict[str, nn.Module]:
    """The linear maps of a site that is on in this block, by part: "map"; for text also "step" in
    its group's last block."""
    names = architecture.projection_names[kind]
    modules = {part: block.get_submodule(name) for part, name in names.items()}
    return {part: module for part, module in modules.items() if isinstance(module, nn.Linear)}


def projection_state(
    architecture: Architecture, block: nn.Module, kind: str
) -> dict[str, torch.Tensor]:
    """ "map.weight", "map.bias", and in a text group's last block "step.weight", "step.bias"."""
    parts = projection_modules(architecture, block, kind)
    return {
        f"{part}.{name}": tensor
        for part, m in parts.items()
        for name, tensor in m.state_dict().items()
    }


def fill_projection(
    architecture, block: nn.Module, kind: str, state: dict[str, torch.Tensor], where: str
) -> None:
    """Raises ValueError when these are not the tensors of the site."""
    for part, linear in projection_modules(architecture, block, kind).items():
        for name, old in list(linear.named_parameters()):
            new = state.get(f"{part}.{name}")
            if new is None or new.shape != old.shape:
                raise ValueError(
                    f"projection {kind} of block {where}: {part}.{name} is missing or of another shape; "
                    "the file does not match its plan: run distill-width again"
                )
            setattr(linear, name, nn.Parameter(new, requires_grad=old.requires_grad))


def pruned_blocks(
    architecture: Architecture,
    layout: Layout,
    teacher_block: Callable[[int, Edit], nn.Module],
    student: Callable[[Interval], nn.Module],
    projections: Projections | None = None,
) -> list[nn.Module]:
    """One module for every teacher index: a teacher's block, a student, or a pass-through block.

    `teacher_block(index, edit)` returns a new block with `edit` applied (edit is the identity where
    nothing is projected).
    """
    shared: dict[int, SharedText] = {}
    blocks: list[nn.Module] = [
        PassThrough(architecture.block_arguments, architecture.block_returns)
        for _ in range(layout.num_blocks)
    ]
    for place in layout.places:

        def edit(block: nn.Module, place: Place = place) -> nn.Module:
            return project(architecture, block, place, shared, projections)

        blocks[place.index] = (
            edit(student(place.interval)) if place.interval else teacher_block(place.index, edit)
        )
    return blocks


def empty_block(
    architecture: Architecture, config: dict, place: Place, shared: dict[int, SharedText]
) -> nn.Module:
    """What stands at a place, with uninitialised tensors (for meta devices, and to be filled from
    files)."""
    new = build_student(architecture, config, place.interval) if place.interval else None
    return project(
        architecture, new or architecture.build_block(config, place.index), place, shared
    )
