"""Parameters, bytes and FLOPs of a plan's variants, counted on the meta device."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..architectures import REFERENCES, Architecture, BlockState, Inputs, architecture_named
from ..plan import Interval, PruningPlan, Variant
from ..system.json_text import json_text
from .layout import Place, layout_of
from .surgery import empty_block, interval_streams
from .weights import parameter_count, stored_count

Grid = tuple[int, int, int]
Shapes = tuple[tuple[str, torch.Size], ...]

STORED_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Cost:
    """What a block or a model costs."""

    parameters: int
    """trainable values"""
    stored: int
    """values in a file: the parameters, and tables that are not parameters"""
    flops: float
    """of one forward"""

    @property
    def bytes(self) -> int:
        return self.stored * STORED_BYTES


class CostModel:
    """Costs at one size, batch 1: `grid` (frames, rows, columns) of image tokens, followed by the
    references' grids."""

    def __init__(
        self,
        architecture: Architecture,
        config: dict,
        grid: Grid,
        text_tokens: int,
        references: Sequence[Grid] = (),
    ):
        self.architecture, self.config = architecture, config
        self._config_text = json_text(config, sort_keys=True)
        grids = tuple(map(tuple, (grid, *references)))
        size = _size_of(architecture.name, self._config_text, grids, text_tokens)
        self.outer_parameters, self.outer_stored = size.outer_parameters, size.outer_stored
        self._state, self._counted = size.state, size.counted

    @classmethod
    def at(cls, architecture: Architecture, config: dict, inputs: Inputs) -> CostModel:
        """At the size of a calibration batch."""
        grid, *references = map(tuple, inputs["grid"].tolist())
        return cls(architecture, config, grid, inputs["encoder_hidden_states"].shape[1], references)

    def block(self, index: int) -> Cost:
        return self.place(Place(index=index))

    def blocks(self) -> list[Cost]:
        """The cost of every block of the teacher."""
        return [self.block(index) for index in range(self.architecture.num_blocks(self.config))]

    def student(self, interval: Interval) -> Cost:
        return self.place(Place(index=interval.first, interval=interval))

    def variant(self, plan: PruningPlan, variant: Variant) -> Cost:
        parts = [self.place(place) for place in layout_of(plan, variant).places]
        return Cost(
            self.outer_parameters + sum(p.parameters for p in parts),
            self.outer_stored + sum(p.stored for p in parts),
            sum(p.flops for p in parts),
        )

    def place(self, place: Place) -> Cost:
        """The cost of what stands there, projections and correction included; counted once for all
        places that are built alike, in all models of this size."""
        projected = tuple((site.kind, site.form) for site in place.ffn)
        text = (place.text_source is not None, place.steps_text, place.publishes)
        kind = _kind_of(self.architecture.name, self._config_text, place.index)
        built = (kind, self._correction(place.interval), projected, text)
        if built not in self._counted:
            with torch.device("meta"):
                self._counted[built] = self._of(
                    empty_block(self.architecture, self.config, place, {})
                )
        return self._counted[built]

    def linear_maps(
        self, place: Place, skip: Sequence[str] = ()
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(rows, columns) of each linear map there; (rows of a sample, width) of each distinct
        tensor that they read.

        skip: maps with one of these in their names are left out.
        """
        with torch.device("meta"), torch.no_grad():
            block = empty_block(self.architecture, self.config, place, {})
            linears = [(n, m) for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
            maps = [module for name, module in linears if not any(part in name for part in skip)]
            read: dict[int, torch.Tensor] = {}  # kept alive, so that no other tensor gets their ids
            for module in maps:
                module.register_forward_pre_hook(
                    lambda _, given: read.update({id(given[0]): given[0]})
                )
            self.architecture.run_block(block, self._state)
        shapes = [(x.numel() // x.shape[-1], x.shape[-1]) for x in read.values()]
        return [(m.out_features, m.in_features) for m in maps], shapes

    def _correction(self, interval: Interval | None) -> tuple | None:
        """All that tells a student from its interval's first block."""
        if interval is None or interval.correction == "none":
            return None
        streams = interval_streams(self.architecture, self.config, interval)
        return interval.correction, streams

    def _of(self, block: torch.nn.Module) -> Cost:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.architecture.run_block(block, self._state)
        return Cost(parameter_count(block), stored_count(block), float(counter.get_total_flops()))


@dataclass(frozen=True)
class _Size:
    """What the costs of a model at one size are counted from."""

    outer_parameters: int
    outer_stored: int
    state: BlockState
    """a block's input, without memory"""
    counted: dict[tuple, Cost] = field(default_factory=dict)
    """what has been counted so far, by how it is built"""


@lru_cache(maxsize=64)
def _size_of(architecture: str, config: str, grids: tuple[Grid, ...], text_tokens: int) -> _Size:
    """Kept, because every stage of a run counts the same blocks at the same size."""
    named, sizes = architecture_named(architecture), json.loads(config)
    with torch.device("meta"), torch.no_grad():
        outer = named.build_outer(sizes)
        state = _meta_state(named, sizes, outer, grids, text_tokens)
    return _Size(parameter_count(outer), stored_count(outer), state)


@lru_cache(maxsize=1024)
def _kind_of(architecture: str, config: str, index: int) -> Shapes:
    """The names and shapes that tell a teacher's block from other kinds; built once, however many
    costs are counted."""
    with torch.device("meta"):
        block = architecture_named(architecture).build_block(json.loads(config), index)
    return tuple((name, tensor.shape) for name, tensor in block.state_dict().items())


def largest_pair(blocks: Sequence[int]) -> int:
    """The most that two consecutive blocks take: a streamed block computes while the next one is
    read."""
    return max(map(sum, pairwise(blocks)), default=sum(blocks))


def _meta_state(
    architecture: Architecture,
    config: dict,
    outer: torch.nn.Module,
    grids: Sequence[Grid],
    text_tokens: int,
) -> BlockState:
    """A block's input, without memory."""
    inputs = architecture.random_inputs(config, 1, grids[0], text_tokens, "meta")
    inputs["grid"] = torch.tensor(grids, device="cpu")
    if len(grids) > 1:
        tokens, channels = sum(map(math.prod, grids[1:])), inputs["hidden_states"].shape[-1]
        inputs[REFERENCES] = torch.empty(1, tokens, channels, device="meta")
    state = architecture.embed(outer, inputs)
    return replace(state, modulated_text=state.text)
