"""Qwen-Image and its published pruned forms with random weights, made on the device itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from ppcl_engine.architectures import Inputs
from ppcl_engine.architectures.base import placed
from ppcl_engine.architectures.folded import FOLDING, BasisInputs, BasisMap, Folding
from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.models.assembly import empty_model
from ppcl_engine.models.cost import CostModel
from ppcl_engine.models.layout import Layout, layout_of
from ppcl_engine.plan import PruningPlan, Variant, parse_intervals, parse_sites
from ppcl_engine.system.finite import checked_velocity
from ppcl_engine.system.json_text import json_text

from ..shared.teachers import random_tensor
from .formats import to_float8, to_int8
from .scale import PIXELS_PER_TOKEN

QWEN = QwenImage()
PUBLISHED = QWEN.released.intervals["Qwen-Image-12B"][2]
FIRST_EIGHT = ("3-4", "5-7", "8-10", "11-12", "15-24", "25-27", "29-30", "42-43")  # 19 blocks
# of the published 10 B, by the teacher's indices
SITES = parse_sites("ffn_image:2 ffn_text:2 ffn_image:58 ffn_image:59 text:37 text:41 text:51-59")
BASIS = Folding(form="basis", inputs=33)  # rank 32
CONVERT: dict[str, Callable[[nn.Linear], None] | None] = {
    "bfloat16": None,
    "float8": to_float8,
    "int8": to_int8,
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form of the model whose step is timed."""

    intervals: tuple[str, ...] | None = ()
    """those that students replace; None: all"""
    sites: bool = False
    """whether the width sites are on"""
    folded: bool = False
    """whether modulations are folded into a basis"""
    int8: bool = False
    """whether products are in int8, whatever the card's storage is"""

    def variant(self, plan: PruningPlan) -> Variant:
        everything = plan.everything()
        intervals = everything.intervals if self.intervals is None else self.intervals
        sites = everything.sites if self.sites else ()
        return Variant(name="timed", intervals=intervals, sites=sites)

    def layout(self, config: dict) -> Layout:
        plan = plan_of(config)
        layout = layout_of(plan, self.variant(plan))
        assert not layout.notes, layout.notes
        return layout

    def config(self, config: dict) -> dict:
        return {**config, FOLDING: BASIS.to_config()} if self.folded else config


FORMS = {
    "full": Form(),
    "41 blocks": Form(intervals=FIRST_EIGHT),
    "35 blocks": Form(intervals=None),
    "10 B": Form(intervals=None, sites=True),
    "folded": Form(folded=True),
    "int8": Form(int8=True),
}


def plan_of(config: dict) -> PruningPlan:
    """The published intervals and width sites on a model of 60 blocks."""
    return PruningPlan(
        architecture=QWEN.name,
        config=config,
        num_blocks=QWEN.num_blocks(config),
        fingerprint="",
        intervals=parse_intervals(PUBLISHED),
        sites=SITES,
    )


def flops(form: Form, config: dict, side: int, text_tokens: int) -> float:
    """What the blocks need in one forward. A student without a correction costs what a teacher's
    block does, so blocks are counted by their projections alone."""
    costs = cost_model(json_text(form.config(config)), side, text_tokens)
    places = (replace(place, interval=None) for place in form.layout(config).places)
    return sum(costs.place(place).flops for place in places)


@cache
def cost_model(config: str, side: int, text_tokens: int) -> CostModel:
    return CostModel(QWEN, json.loads(config), grid_of(side), text_tokens)


def grid_of(side: int) -> tuple[int, int, int]:
    return 1, side // PIXELS_PER_TOKEN, side // PIXELS_PER_TOKEN


def random_model(form: Form, config: dict, storage: str, device: str) -> nn.Module:
    """The model in bf16; its blocks' linear maps as `storage` says, or in int8."""
    empty = empty_model(QWEN, form.config(config), form.layout(config))
    return filled(empty, device, "int8" if form.int8 else storage)


def filled(model: nn.Module, device: str, storage: str) -> nn.Module:
    """An empty model with random weights on the device. A map is converted as soon as it is filled,
    so that the model is never there in 16 bits when it is stored in 8."""
    generator, convert = torch.Generator(device).manual_seed(0), CONVERT[storage]
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        dtype = torch.float32 if isinstance(module, BasisMap) else torch.bfloat16
        for leaf, empty in own.items():
            value = random_tensor(f"{name}.{leaf}", tuple(empty.shape), generator).to(dtype)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        if isinstance(module, BasisInputs):
            shape = tuple(module.directions.shape)
            module.directions = random_tensor("directions", shape, generator)
        if convert and type(module) is nn.Linear and name.startswith("transformer_blocks."):
            convert(module)
    return model.eval()


def random_inputs(config: dict, side: int, text_tokens: int, device: str) -> Inputs:
    """One picture's, without a mask of the text: all of its tokens are real, and fast attention
    kernels take no mask."""
    torch.manual_seed(0)
    inputs = QWEN.random_inputs(config, 1, grid_of(side), text_tokens, device)
    del inputs["encoder_hidden_states_mask"]
    return placed(inputs, device, torch.bfloat16)


def step_of(model: nn.Module, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """One forward, as a sampler calls it. Raises ValueError where its velocity is not finite."""

    @torch.no_grad()
    def step() -> torch.Tensor:
        return QWEN.call(model, inputs)

    checked_velocity(step())
    return step
