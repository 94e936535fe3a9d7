"""Parameters, bytes and FLOPs of a plan's variants: from the shapes of a block's tensors; where parts
of it are projected, from the block itself on the meta device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..architectures import REFERENCES, Architecture, Inputs
from ..architectures.folded import folding_of
from ..architectures.linear_maps import LINEAR_MAPS
from ..architectures.shapes import (
    TEXT_MAPS,
    Shapes,
    block_shapes,
    has_one_stream,
    number_of_values,
    outer_shapes,
)
from ..plan import Interval, PruningPlan, Variant
from .layout import Place, layout_of
from .surgery import empty_block, interval_streams
from .weights import parameter_count, stored_count

Grid = tuple[int, int, int]

STORED_BYTES = 2  # bfloat16
TEXT_MODULATION = "txt_mod."  # Qwen-Image's, the only one here whose references have a timestep


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
        self._grids, self._text_tokens = [grid, *references], text_tokens
        outer = outer_shapes(architecture, config)
        self.outer_parameters = number_of_values(outer, tables=False)
        self.outer_stored = number_of_values(outer, tables=True)
        self._counted: dict[tuple, Cost] = {}

    @cached_property
    def _state(self):
        with torch.device("meta"), torch.no_grad():
            return _meta_state(self.architecture, self.config, self._grids, self._text_tokens)

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
        places that are built alike."""
        projected = tuple((site.kind, site.form) for site in place.ffn)
        text = (place.text_source is not None, place.steps_text, place.publishes)
        shapes = block_shapes(self.architecture, self.config, place.index)
        built = (tuple(shapes.items()), place.interval, projected, text)
        if built not in self._counted:
            plain = not place.projections
            self._counted[built] = self._computed(place, shapes) if plain else self._built(place)
        return self._counted[built]

    def largest_map(self, place: Place) -> int:
        """Values of the largest linear map of the teacher's block there."""
        shapes = block_shapes(self.architecture, self.config, place.index).values()
        return max(math.prod(shape) for shape in shapes if len(shape) == 2)

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

    def _built(self, place: Place) -> Cost:
        with torch.device("meta"):
            block = empty_block(self.architecture, self.config, place, {})
        state = self._state  # made here, so that what makes it is not counted
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.architecture.run_block(block, state)
        return Cost(parameter_count(block), stored_count(block), float(counter.get_total_flops()))

    def _computed(self, place: Place, shapes: Shapes) -> Cost:
        correction = self._correction(place.interval) if place.interval else {}
        values = number_of_values(shapes, tables=True) + sum(
            number_of_values(maps, tables=True) for maps in correction.values()
        )
        return Cost(values, values, float(self._flops(shapes, correction)))

    def _correction(self, interval: Interval) -> dict[str, Shapes]:
        """stream -> the tensors of its map, as `surgery.Correction` has them."""
        if interval.correction == "none":
            return {}
        width = self.architecture.width(self.config)
        maps: Shapes = {"weight": (width, width), "bias": (width,)}
        if interval.correction != "affine":
            rank = int(interval.correction)
            maps = {"0.weight": (rank, width), "1.weight": (width, rank), "1.bias": (width,)}
        streams = interval_streams(self.architecture, self.config, interval)
        return dict.fromkeys(streams, maps)

    def _flops(self, shapes: Shapes, correction: dict[str, Shapes]) -> int:
        """Two for each weight and row that it is multiplied with; attention multiplies all tokens with
        all, twice."""
        tokens = {"image": sum(map(math.prod, self._grids)), "text": self._text_tokens}
        everything = tokens["image"] + tokens["text"]
        own = {"text": everything, "image": everything} if has_one_stream(shapes) else tokens
        conditioning = LINEAR_MAPS[self.architecture.name].conditioning
        # references have a timestep of their own, and are pictures
        times = 1 + len(self.architecture.reference_timesteps(self.config))
        folding, flops = folding_of(self.config), 0
        for name, shape in shapes.items():
            rows = own["text" if name.startswith(TEXT_MAPS) else "image"]
            if name.startswith(conditioning):
                rows = 1 if name.startswith(TEXT_MODULATION) else times
                if folding is not None and folding.form == "table":
                    rows = 0  # a table is looked up, not multiplied
            flops += 2 * rows * math.prod(shape) if len(shape) == 2 else 0
        for stream, maps in correction.items():
            values = sum(math.prod(shape) for shape in maps.values() if len(shape) == 2)
            flops += 2 * tokens[stream] * values
        attended = {"attn": everything, "attn2": tokens["image"]}
        width = self.architecture.width(self.config)
        return flops + sum(
            4 * n * n * width for name, n in attended.items() if f"{name}.to_q.weight" in shapes
        )


def largest_pair(blocks: Sequence[int]) -> int:
    """The most that two consecutive blocks take: a streamed block computes while the next one is
    read."""
    return max(map(sum, pairwise(blocks)), default=sum(blocks))


def _meta_state(architecture: Architecture, config: dict, grids: list[Grid], text_tokens: int):
    """A block's input, without memory, from an outer part of the same shapes."""
    outer = architecture.build_outer(config)
    inputs = architecture.random_inputs(config, 1, grids[0], text_tokens, "meta")
    inputs["grid"] = torch.tensor(grids, device="cpu")
    if len(grids) > 1:
        tokens, channels = sum(map(math.prod, grids[1:])), inputs["hidden_states"].shape[-1]
        inputs[REFERENCES] = torch.empty(1, tokens, channels, device="meta")
    state = architecture.embed(outer, inputs)
    return replace(state, modulated_text=state.text)
