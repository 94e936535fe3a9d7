"""Parameters, bytes and FLOPs of a plan's variants, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from .architectures import Architecture
from .checkpoint import parameter_count
from .plan import Interval, PruningPlan, Variant
from .surgery import build_student


@dataclass(frozen=True)
class Cost:
    parameters: int
    flops: float


class CostModel:
    """Costs at one reference size: `grid` (frames, rows, columns) of image tokens, batch 1."""

    def __init__(self, architecture: Architecture, config: dict, grid: tuple[int, int, int], text_tokens: int):
        self.architecture, self.config = architecture, config
        with torch.device("meta"):
            self.outer_parameters = parameter_count(architecture.build_outer(config))
            self._state = _meta_state(architecture, config, grid, text_tokens)
        self._blocks: dict = {}

    def block(self, index: int) -> Cost:
        if index not in self._blocks:
            with torch.device("meta"):
                self._blocks[index] = self._of(self.architecture.build_block(self.config, index))
        return self._blocks[index]

    def student(self, interval: Interval) -> Cost:
        with torch.device("meta"):
            return self._of(build_student(self.architecture, self.config, interval))

    def variant(self, plan: PruningPlan, variant: Variant) -> Cost:
        intervals = [plan.interval(name) for name in variant.intervals]
        replaced = {index for interval in intervals for index in interval.blocks}
        parts = [self.block(i) for i in range(plan.num_blocks) if i not in replaced]
        parts += [self.student(interval) for interval in intervals]
        return Cost(self.outer_parameters + sum(p.parameters for p in parts), sum(p.flops for p in parts))

    def _of(self, block: torch.nn.Module) -> Cost:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.architecture.run_block(block, self._state)
        return Cost(parameter_count(block), float(counter.get_total_flops()))


def _meta_state(architecture: Architecture, config: dict, grid: tuple[int, int, int], text_tokens: int):
    """A block's input without memory, made by an outer part of the same shapes."""
    outer = architecture.build_outer(config)
    inputs = architecture.random_inputs(config, 1, grid, text_tokens, "meta")
    return architecture.embed(outer, {**inputs, "grid": torch.tensor([grid], device="cpu")})
