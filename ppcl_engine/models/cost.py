"""Parameters, bytes and FLOPs of a plan's variants: from the shapes of a block's tensors; where parts
of it are projected, from the block itself on the meta device."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..architectures import REFERENCES, Architecture, BlockState, Inputs, architecture_named
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
from ..system.json_text import json_text
from .layout import Place, layout_of
from .surgery import empty_block, interval_streams
from .weights import parameter_count, stored_count

Grid = tuple[int, int, int]
Pairs = list[tuple[int, int]]

STORED_BYTES = 2  # bfloat16
CORRECTION = "correction.maps."
TEXT_MODULATION = "txt_mod."  # Qwen-Image's, the only one here whose references have a timestep
READ_AS = {
    "attn.to_k": "attn.to_q",
    "attn.to_v": "attn.to_q",
    "proj_mlp": "attn.to_q",
    "attn.add_k_proj": "attn.add_q_proj",
    "attn.add_v_proj": "attn.add_q_proj",
    "attn2.to_k": "attn2.to_q",
    "attn2.to_v": "attn2.to_q",
    "attention.to_k": "attention.to_q",
    "attention.to_v": "attention.to_q",
    "feed_forward.w3": "feed_forward.w1",
    "img_mlp.gate_layer": "img_mlp.proj",
}
"""maps that read the very tensor that another one reads"""


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
        self._grids = [grid, *references]
        outer = outer_shapes(architecture, config)
        self.outer_parameters = number_of_values(outer, tables=False)
        self.outer_stored = number_of_values(outer, tables=True)
        self._text_tokens = architecture.filled_up(text_tokens)
        self._image_tokens = architecture.filled_up(sum(map(math.prod, self._grids)))
        self._conditioning = LINEAR_MAPS[architecture.name].conditioning
        self._size = (
            architecture.name,
            json_text(config, sort_keys=True),
            tuple(map(tuple, self._grids)),
            text_tokens,
        )
        self._counted = _counted_at(*self._size)

    @property
    def _state(self) -> BlockState:
        return _state_at(*self._size)

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
        shapes = self._shapes(place)
        correction = place.interval and place.interval.correction
        built = (tuple(shapes.items()), correction, projected, text)
        if built not in self._counted:
            self._counted[built] = (
                self._built(place) if place.projections else self._computed(shapes)
            )
        return self._counted[built]

    def _shapes(self, place: Place) -> Shapes:
        """The tensors there before anything is projected."""
        shapes = block_shapes(self.architecture, self.config, place.index)
        if place.interval is None or place.interval.correction == "none":
            return shapes
        width, correction = self.architecture.width(self.config), place.interval.correction
        maps: Shapes = {"weight": (width, width), "bias": (width,)}
        if correction != "affine":  # as surgery.Correction has them
            rank = int(correction)
            maps = {"0.weight": (rank, width), "1.weight": (width, rank), "1.bias": (width,)}
        for stream in interval_streams(self.architecture, self.config, place.interval):
            shapes |= {f"{CORRECTION}{stream}.{name}": shape for name, shape in maps.items()}
        return shapes

    def largest_map(self, place: Place) -> int:
        """Values of the largest linear map of the teacher's block there."""
        shapes = block_shapes(self.architecture, self.config, place.index).values()
        return max(math.prod(shape) for shape in shapes if len(shape) == 2)

    def linear_maps(self, place: Place, skip: Sequence[str] = ()) -> tuple[Pairs, Pairs]:
        """(rows, columns) of each linear map there; (rows of a sample, width) of each distinct
        tensor that they read.

        skip: maps with one of these in their names are left out.
        """
        if not place.projections and folding_of(self.config) is None:
            return self._computed_maps(self._shapes(place), skip)
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

    def _computed(self, shapes: Shapes) -> Cost:
        values = number_of_values(shapes, tables=True)
        return Cost(values, values, float(self._flops(shapes)))

    def _flops(self, shapes: Shapes) -> int:
        """Two for each weight and row that it is multiplied with; attention multiplies pairs of tokens,
        twice."""
        folding, flops = folding_of(self.config), 0
        looked_up = self._conditioning if folding is not None and folding.form == "table" else ()
        for name, shape in shapes.items():
            if len(shape) == 2 and not name.startswith(looked_up):
                flops += 2 * self._rows(name, shapes) * math.prod(shape)
        both = self.architecture.attended_pairs(self._image_tokens, self._text_tokens)
        attended = {"attn": both, "attention": both, "attn2": self._image_tokens**2}
        width = self.architecture.width(self.config)
        return flops + sum(
            4 * pairs * width for name, pairs in attended.items() if f"{name}.to_q.weight" in shapes
        )

    def _rows(self, name: str, shapes: Shapes) -> int:
        """How many rows of a sample the map of this name reads."""
        image, text = self._image_tokens, self._text_tokens
        if name.startswith(CORRECTION):
            return text if name.startswith(f"{CORRECTION}text.") else image
        if name.startswith(self._conditioning):
            # references have a timestep of their own, and are pictures
            times = 1 + len(self.architecture.reference_timesteps(self.config))
            return 1 if name.startswith(TEXT_MODULATION) else times
        if has_one_stream(shapes):
            return image + text
        return text if name.startswith(TEXT_MAPS) else image

    def _computed_maps(self, shapes: Shapes, skip: Sequence[str]) -> tuple[Pairs, Pairs]:
        maps, read = [], {}
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if len(shape) == 2 and not any(part in module for part in skip):
                maps.append((shape[0], shape[1]))
                read[READ_AS.get(module, module)] = (self._rows(name, shapes), shape[1])
        return maps, list(read.values())


@lru_cache(maxsize=64)
def _counted_at(
    architecture: str, config: str, grids: tuple[Grid, ...], text_tokens: int
) -> dict[tuple, Cost]:
    """What has been counted at this size so far, by how it is built: every stage of a run counts the
    same blocks."""
    return {}


@lru_cache(maxsize=64)
def _state_at(
    architecture: str, config: str, grids: tuple[Grid, ...], text_tokens: int
) -> BlockState:
    with torch.device("meta"), torch.no_grad():
        return _meta_state(
            architecture_named(architecture), json.loads(config), list(grids), text_tokens
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
