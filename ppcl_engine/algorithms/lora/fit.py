"""The pairs of one place: begun from the LoRA's own, fitted in closed form, then trained a little.

What is asked of them is the change that the LoRA makes: student with pairs, on what the teacher with
the LoRA reads there, minus student alone on what the teacher alone reads, is to be the difference of
the two teachers behind the place. So the student's own error is not part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ...architectures import BlockState
from ...architectures.modules import AnyModule
from ...models.lora_files import LoraFile, ReadTensor
from ...models.lora_kinds import LowRank
from ...models.streaming import Teacher, mixed_precision
from ..distillation.losses import TINY
from ..least_squares import RIDGE
from .low_rank import GatedEquations, nearest, truncated
from .needed import Names, Work, last_maps
from .pairs import Pairs, beside, changed


@dataclass(frozen=True)
class Goal:
    """One batch at one strength."""

    strength: float
    source: BlockState
    """what the place reads where the teacher has the LoRA"""
    wanted: BlockState
    """what it is to give"""
    power: dict[str, float]
    """stream -> the squared norm of the change that the LoRA makes in it, of real tokens"""


class PlaceFit:
    """A place's block, and the pairs beside it."""

    def __init__(
        self, teacher: Teacher, block: AnyModule, work: Work, lora: LoraFile, base: ReadTensor
    ):
        self.teacher, self.block, self.work = teacher, block.requires_grad_(False), work
        self.architecture, self.lora, self.base = teacher.architecture, lora, base
        self.streams = _streams(teacher, work)
        self.prefix = self.architecture.block_prefix(teacher.config, work.place.index)

    @contextmanager
    def own_changes(self, strength: float, fitted: Sequence[str]) -> Iterator[None]:
        """Meanwhile the parts of a teacher's block that are left have what the LoRA says of them. A
        student has new pairs instead."""
        if self.work.place.interval is not None:
            yield
            return
        without = {f"{name}.{leaf}" for name in fitted for leaf in ("weight", "bias")}
        with changed(self.block, self.prefix, self.lora, strength, self.base, without):
            yield

    def run(self, pairs: Pairs, goal: Goal) -> BlockState:
        with (
            self.own_changes(goal.strength, pairs.names),
            beside(self.block, pairs, goal.strength),
            mixed_precision(self.teacher),
        ):
            return self.architecture.run_block(self.block, goal.source)

    def loss(self, pairs: Pairs, goal: Goal) -> torch.Tensor:
        """Sum over streams of || wanted - given ||^2 / || change ||^2: 1 a stream where nothing of the
        change is there."""
        given = self.run(pairs, goal)
        errors = [
            (_rows(given, goal, s) - goal.wanted.real_tokens(s).float()).square().sum()
            / max(goal.power[s], TINY)
            for s in self.streams
        ]
        return torch.stack(errors).sum()

    @torch.no_grad()
    def mean_loss(self, pairs: Pairs, goals: Iterable[Goal]) -> float:
        losses = [float(self.loss(pairs, goal)) for goal in goals]
        return sum(losses) / len(losses)

    def closed_form(self, pairs: Pairs, goals: Iterable[Goal], rank: int) -> dict[str, LowRank]:
        """The pairs of the last maps, by least squares on what the others leave. They alone reach the
        stream through nothing but a gate, so that its change is linear in theirs."""
        maps = {
            s: m
            for s, m in last_maps(self.architecture, self.block, self.work).items()
            if m in pairs.names
        }
        if not maps:
            return {}
        modules: dict[str, nn.Linear] = {m: self.block.get_submodule(m) for m in maps.values()}
        equations = {
            m: GatedEquations(linear.in_features, linear.out_features, self.teacher.device)
            for m, linear in modules.items()
        }
        inverse = _inverse_corrections(self.block)
        silent = pairs.replaced({m: _silent(pairs.get(m)) for m in modules})
        others = Pairs(silent, len(pairs.down[0]), self.teacher.device)
        for goal in goals:
            given, inputs, gates = self._watched(others, goal, maps)
            missing = _missing(goal, given, inverse)
            for stream, name in maps.items():
                real = given.real(stream)
                for n in range(len(real)):
                    equations[name].add(
                        inputs[name][n][real[n]],
                        goal.strength * gates[name][n],
                        missing.stream(stream)[n][real[n]],
                    )
        return {name: sums.solve(rank) for name, sums in equations.items()}

    def _watched(
        self, pairs: Pairs, goal: Goal, maps: dict[str, str]
    ) -> tuple[BlockState, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What the block gives, what the maps read [n, tokens, inputs], and their gates [n, outputs]:
        the derivative of the stream, before a correction, by the map's output."""
        inputs, added = {}, {}

        def hook(name: str):
            def add_nothing(module, arguments, output):
                inputs[name] = arguments[0].detach()
                added[name] = torch.zeros_like(output, requires_grad=True)
                return output + added[name]

            return add_nothing

        handles = [
            self.block.get_submodule(m).register_forward_hook(hook(m)) for m in maps.values()
        ]
        try:
            with torch.no_grad():
                given = self.run(pairs, goal)
            with torch.enable_grad(), _uncorrected(self.block):
                before = self.run(pairs, goal)
            total = torch.stack([before.stream(s).float().sum() for s in maps]).sum()
            found = torch.autograd.grad(total, [added[m] for m in maps.values()])
        finally:
            for handle in handles:
                handle.remove()
        gates = {m: g.float().mean(1) for m, g in zip(maps.values(), found, strict=True)}
        return given, inputs, gates


def begun_pairs(
    names: Names, block: AnyModule, maps: Sequence[str], rank: int, blocks: range, base: ReadTensor
) -> dict[str, LowRank]:
    """What the LoRA says of these blocks at each map, summed: to first order, what a residual stream
    gets from blocks that follow each other. Nothing for a map that it does not change."""
    return {
        name: _summed(names, name, block.get_submodule(name), rank, blocks, base) for name in maps
    }


def _summed(
    names: Names, name: str, linear: nn.Linear, rank: int, blocks: range, base: ReadTensor
) -> LowRank:
    lora = names.lora
    keys = [f"{names.prefixes[i]}{name}.weight" for i in blocks]
    keys = [key for key in keys if key in lora.targets]
    found = [lora.low_rank(key) for key in keys]
    pairs = [pair for some in found for pair in some or []]
    if pairs and None not in found:
        return truncated(pairs, rank)
    if keys:
        changes = [lora.change(key, 1.0, base) for key in keys]
        return nearest(torch.stack([c for c in changes if c is not None]).sum(0), rank)
    return LowRank(torch.zeros(0, linear.in_features), torch.zeros(linear.out_features, 0), 1.0)


def _silent(pair: LowRank) -> LowRank:
    return LowRank(pair.down, torch.zeros_like(pair.up), 1.0)


def _streams(teacher: Teacher, work: Work) -> tuple[str, ...]:
    """The streams that a later block reads, without a text that this place does not move."""
    place, used = work.place, teacher.used_streams(work.place.last)
    still = place.text_source is not None and not place.steps_text
    return tuple(s for s in used if not (still and s == "text"))


def _rows(given: BlockState, goal: Goal, stream: str) -> torch.Tensor:
    return given.stream(stream)[goal.wanted.real(stream)].float()


@contextmanager
def _uncorrected(block: AnyModule) -> Iterator[None]:
    """Meanwhile the block returns what it does before its correction."""
    correction = getattr(block, "correction", None)
    if correction is None:
        yield
        return
    maps, correction.maps = correction.maps, nn.ModuleDict()
    try:
        yield
    finally:
        correction.maps = maps


def _inverse_corrections(block: AnyModule) -> dict[str, torch.Tensor]:
    """Stream -> the matrix that takes a change behind its correction to the one before it."""
    correction = getattr(block, "correction", None)
    if correction is None:
        return {}
    inverses = {}
    for stream, linear in correction.maps.items():
        parts = [linear] if isinstance(linear, nn.Linear) else list(linear)
        matrix = parts[-1].weight.double()
        for part in reversed(parts[:-1]):
            matrix = matrix @ part.weight.double()
        matrix = matrix + torch.eye(len(matrix), device=matrix.device)
        gram = matrix.T @ matrix
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        inverses[stream] = torch.linalg.solve(gram, matrix.T)
    return inverses


def _missing(goal: Goal, given: BlockState, inverse: dict[str, torch.Tensor]) -> BlockState:
    """The change that the streams still have to make, before a correction."""

    def of(stream: str) -> torch.Tensor:
        change = goal.wanted.stream(stream).double() - given.stream(stream).double()
        return change @ inverse[stream].T if stream in inverse else change

    return given.with_streams(of("image"), of("text"))
