"""Seconds a step of every form of the model, beside its share of the FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ppcl_engine.system.machine import PeakMemory

from .card import Card
from .models import FORMS, Form, flops, random_inputs, random_model, step_of
from .scale import Scale
from .table import Line

FULL, AGAIN = "full", "full, again"
GOAL = 1.02
"""share of the time over share of the FLOPs, at most"""


def rows(card: Card, scale: Scale, folder: Path) -> dict[str, Callable[[], dict]]:
    """The full model once more at the end: what a card that grew warm loses."""
    forms = {name: FORMS[name] for name in scale.forms} | {AGAIN: FORMS[FULL]}
    return {
        row_name(name, side): partial(measure, card, scale, form, side)
        for side in scale.sides
        for name, form in forms.items()
    }


def row_name(form: str, side: int) -> str:
    return f"{form}, {side} x {side}"


def measure(card: Card, scale: Scale, form: Form, side: int) -> dict:
    memory, storage = PeakMemory(card.device), card.storage(scale.parameters)
    model = random_model(form, scale.config, storage, card.device)
    step = step_of(model, random_inputs(scale.config, side, scale.text_tokens, card.device))
    timed = card.timed(step, scale.warm_up, scale.repeats)
    return {
        **timed,
        "peak": memory.above_start(),
        "flops": flops(form, scale.config, side, scale.text_tokens),
        "storage": "int8" if form.int8 else storage,
    }


def lines(measured: dict[str, dict]) -> list[Line]:
    return [_line(name, row, measured[_full(name)]) for name, row in measured.items()]


def _full(name: str) -> str:
    """The row of the full model at the same size."""
    return f"{FULL}, {name.rpartition(', ')[2]}"


def _line(name: str, row: dict, full: dict) -> Line:
    if "cut" in row or "cut" in full:
        return Line.of(name, row, row.get("storage", ""))
    time_share, flop_share = row["seconds"] / full["seconds"], row["flops"] / full["flops"]
    note = f"{row['storage']}, {row['flops'] / row['seconds'] / 1e12:.3g} TFLOP/s"
    if time_share / flop_share > GOAL:
        note += f"; above {GOAL}"
    return Line.of(name, row, note, time_share=time_share, flop_share=flop_share)
