"""A step with torch.compile and without, block by block: blocks of one kind share what was
compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ppcl_engine.models.surgery import PassThrough
from ppcl_engine.system.machine import PeakMemory

from .card import Card
from .models import FORMS, Form, random_inputs, random_model, step_of
from .scale import Scale
from .table import Line

KINDS_OF_BLOCKS = 64
"""that may be compiled, at most; torch would run the ninth kind without compiling it, silently"""


def rows(card: Card, scale: Scale, folder: Path) -> dict[str, Callable[[], dict]]:
    return {name: partial(measure, card, scale, FORMS[name]) for name in scale.compiled}


def measure(card: Card, scale: Scale, form: Form) -> dict:
    memory = PeakMemory(card.device)
    model = random_model(form, scale.config, card.storage(scale.parameters), card.device)
    inputs = random_inputs(scale.config, scale.sides[0], scale.text_tokens, card.device)
    step = step_of(model, inputs)
    eager, expected = card.timed(step, scale.warm_up, scale.repeats), step()
    limits = {"recompile_limit": KINDS_OF_BLOCKS, "accumulated_recompile_limit": KINDS_OF_BLOCKS}
    with torch._dynamo.config.patch(**limits, fail_on_recompile_limit_hit=True):
        for block in model.transformer_blocks:
            if not isinstance(block, PassThrough):
                block.compile(backend=scale.backend, dynamic=False)
        compiling = card.seconds(step)
        timed = card.timed(step, scale.warm_up, scale.repeats)
        difference = float((step() - expected).float().norm() / expected.float().norm())
    return {
        **timed,
        "eager_seconds": eager["seconds"],
        "compiling_seconds": compiling,
        "difference": difference,
        "peak": memory.above_start(),
    }


def lines(measured: dict[str, dict]) -> list[Line]:
    return [_line(name, row) for name, row in measured.items()]


def _line(name: str, row: dict) -> Line:
    if "cut" in row:
        return Line.of(name, row)
    note = (
        f"{row['eager_seconds']:.4g} s without; compiling takes {row['compiling_seconds']:.3g} s; "
        f"differs by {row['difference']:.1g}"
    )
    return Line.of(name, row, note, time_share=row["seconds"] / row["eager_seconds"])
