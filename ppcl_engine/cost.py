"""Parameters, bytes and FLOPs of a plan's variants, counted on the meta device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from .architectures import REFERENCES, Architecture, Inputs
from .checkpoint import parameter_count
from .layout import Place, layout_of
from .plan import Interval, PruningPlan, Variant
from .surgery import empty_block

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Cost:
    parameters: int
    flops: float


class CostModel:
    """Costs at one size, batch 1: `grid` (frames, rows, columns) of image tokens, those of references behind it."""

    def __init__(
        self,
        architecture: Architecture,
        config: dict,
        grid: Grid,
        text_tokens: int,
        references: Sequence[Grid] = (),
    ):
        self.architecture, self.config = architecture, config
        with torch.device("meta"), torch.no_grad():
            self.outer_parameters = parameter_count(architecture.build_outer(config))
            self._state = _meta_state(architecture, config, [grid, *references], text_tokens)
        self._places: dict[Place, Cost] = {}

    @classmethod
    def at(cls, architecture: Architecture, config: dict, inputs: Inputs) -> CostModel:
        """At the size of a calibration batch."""
        grid, *references = map(tuple, inputs["grid"].tolist())
        return cls(architecture, config, grid, inputs["encoder_hidden_states"].shape[1], references)

    def block(self, index: int) -> Cost:
        return self.place(Place(index=index))

    def student(self, interval: Interval) -> Cost:
        return self.place(Place(index=interval.first, interval=interval))

    def variant(self, plan: PruningPlan, variant: Variant) -> Cost:
        parts = [self.place(place) for place in layout_of(plan, variant).places]
        return Cost(self.outer_parameters + sum(p.parameters for p in parts), sum(p.flops for p in parts))

    def place(self, place: Place) -> Cost:
        """Of what stands there, projections and correction included."""
        if place not in self._places:
            with torch.device("meta"):
                self._places[place] = self._of(empty_block(self.architecture, self.config, place, {}))
        return self._places[place]

    def _of(self, block: torch.nn.Module) -> Cost:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.architecture.run_block(block, self._state)
        return Cost(parameter_count(block), float(counter.get_total_flops()))


def _meta_state(architecture: Architecture, config: dict, grids: list[Grid], text_tokens: int):
    """A block's input without memory, made by an outer part of the same shapes."""
    outer = architecture.build_outer(config)
    inputs = architecture.random_inputs(config, 1, grids[0], text_tokens, "meta")
    inputs["grid"] = torch.tensor(grids, device="cpu")
    if len(grids) > 1:
        tokens, channels = sum(map(math.prod, grids[1:])), inputs["hidden_states"].shape[-1]
        inputs[REFERENCES] = torch.empty(1, tokens, channels, device="meta")
    state = architecture.embed(outer, inputs)
    return replace(state, modulated_text=state.text)
