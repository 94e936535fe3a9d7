"""Edits to a model: students in place of intervals, corrections behind them, gaps that pass through.

A pruned model keeps the teacher's indices: where an interval was replaced, its first place holds
the student and the others hold weightless pass-through blocks. LoRA names and ControlNet depth
then come out right with no translation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .architectures import Architecture
from .plan import Interval


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


def add_correction(block: nn.Module, correction: Correction, returns: tuple[str, ...]) -> nn.Module:
    """Puts the correction behind what the block returns.

    As a part of the block and a hook on it, not a module around it: the block's own tensors keep the names
    that LoRA files know them by.
    """

    def correct(module: nn.Module, arguments, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(module.correction.correct(s, x) for s, x in zip(returns, outputs, strict=True))

    block.correction = correction
    block.register_forward_hook(correct)
    return block


class PassThrough(nn.Module):
    """Stands where a block was dropped; its arguments' names and order are the architecture's."""

    def __init__(self, arguments: dict[str, str], returns: tuple[str, ...]):
        super().__init__()
        self.order = list(arguments.values())
        self.returned = [arguments[stream] for stream in returns]

    def forward(self, *arguments, **named):
        named |= dict(zip(self.order, arguments, strict=False))
        return tuple(named[name] for name in self.returned)


def interval_streams(architecture: Architecture, config: dict, interval: Interval) -> tuple[str, ...]:
    """The streams that anything behind the interval reads."""
    return architecture.used_streams(config, interval.last)


def build_student(architecture: Architecture, config: dict, interval: Interval) -> nn.Module:
    """An empty student of the form the interval names (plain block, or with a correction)."""
    block = architecture.build_block(config, interval.first)
    if interval.correction == "none":
        return block
    rank = None if interval.correction == "affine" else int(interval.correction)
    streams = interval_streams(architecture, config, interval)
    correction = Correction(architecture.width(config), streams, rank)
    return add_correction(block, correction, architecture.block_returns)


def filled_student(
    architecture: Architecture, config: dict, interval: Interval, state: dict[str, torch.Tensor]
) -> nn.Module:
    """A student with these tensors as its own, for inference. Raises ValueError when they are not its tensors."""
    with torch.device("meta"):
        student = build_student(architecture, config, interval)
    wrong = sorted(student.state_dict().keys() ^ state.keys())
    if wrong:
        raise ValueError(
            f"student {interval.name}: tensor {wrong[0]} is missing or has no home; the file does not match its plan: run distill-depth again"
        )
    student.load_state_dict(state, assign=True)
    return student.eval().requires_grad_(False)


def pruned_blocks(
    architecture: Architecture,
    num_blocks: int,
    intervals: Sequence[Interval],
    teacher_block: Callable[[int], nn.Module],
    student: Callable[[Interval], nn.Module],
) -> list[nn.Module]:
    """One module a teacher index: teacher block, student, or pass-through."""
    starts = {interval.first: interval for interval in intervals}
    gaps = {index for interval in intervals for index in interval.blocks}
    blocks: list[nn.Module] = []
    for index in range(num_blocks):
        if index in starts:
            blocks.append(student(starts[index]))
        elif index in gaps:
            blocks.append(PassThrough(architecture.block_arguments, architecture.block_returns))
        else:
            blocks.append(teacher_block(index))
    return blocks
