"""2:4 weights on the GPU's kernels beside the same weights as dense ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ppcl_engine.algorithms.sparsity.kernels import on_kernels
from ppcl_engine.algorithms.sparsity.patterns import kept_of_groups, pattern_named
from ppcl_engine.models.assembly import empty_model
from ppcl_engine.models.layout import full_layout

from .card import Card
from .models import QWEN, filled, grid_of, random_inputs, step_of
from .scale import Scale
from .table import Line

MAPS = {"attention's map": (1, 1), "FFN, first map": (1, 4), "FFN, second map": (4, 1)}
"""inputs and outputs, in widths"""
PATTERN = pattern_named("2:4")
NO_KERNELS = {"cut": "this device has no 2:4 kernels"}


def rows(card: Card, scale: Scale, folder: Path) -> dict[str, Callable[[], dict]]:
    width, measured = QWEN.width(scale.config), {}
    for name, (inputs, outputs) in MAPS.items():
        sizes = (inputs * width, outputs * width)
        row = f"{name}, {sizes[0]} to {sizes[1]}"
        measured[row] = partial(measure_map, card, scale, *sizes)
    measured[f"{scale.sparse_blocks} blocks"] = partial(measure_blocks, card, scale)
    return measured


@torch.no_grad()
def measure_map(card: Card, scale: Scale, inputs: int, outputs: int) -> dict:
    """One linear map, on the image tokens of the largest picture."""
    generator = torch.Generator(card.device).manual_seed(0)
    options = {"device": card.device, "dtype": torch.bfloat16}
    linear = nn.Linear(inputs, outputs, **options)
    linear.weight.normal_(std=inputs**-0.5, generator=generator)
    _, rows, columns = grid_of(scale.sides[0])
    x = torch.randn(1, rows * columns, inputs, generator=generator, **options)
    return compared(card, scale, nn.Sequential(linear), lambda model: lambda: model(x))


@torch.no_grad()
def measure_blocks(card: Card, scale: Scale) -> dict:
    """A model of a few blocks, all of whose linear maps are 2:4."""
    config = {**scale.config, "num_layers": scale.sparse_blocks}
    empty = empty_model(QWEN, config, full_layout(scale.sparse_blocks))
    inputs = random_inputs(config, scale.sides[0], scale.text_tokens, card.device)
    model = filled(empty, card.device, "bfloat16")
    return compared(card, scale, model, lambda model: step_of(model, inputs))


def compared(
    card: Card,
    scale: Scale,
    model: nn.Module,
    work_of: Callable[[nn.Module], Callable[[], torch.Tensor]],
) -> dict:
    """The model with 2:4 weights, dense, then on the kernels."""
    for module in (m for m in model.modules() if isinstance(m, nn.Linear)):
        module.weight.masked_fill_(~kept_of_groups(module.weight.abs(), PATTERN), 0)
    dense, expected = card.timed(work_of(model), scale.warm_up, scale.repeats), work_of(model)()
    maps = on_kernels(model)
    if not maps:
        return NO_KERNELS
    sparse, found = card.timed(work_of(model), scale.warm_up, scale.repeats), work_of(model)()
    return {
        **sparse,
        "maps": maps,
        "dense_seconds": dense["seconds"],
        "difference": float((found - expected).float().norm() / expected.float().norm()),
    }


def lines(measured: dict[str, dict]) -> list[Line]:
    return [_line(name, row) for name, row in measured.items()]


def _line(name: str, row: dict) -> Line:
    if "cut" in row:
        return Line.of(name, row)
    note = f"{row['dense_seconds']:.4g} s dense; {row['maps']} maps; differs by {row['difference']:.1g}"
    return Line.of(name, row, note, time_share=row["seconds"] / row["dense_seconds"])
