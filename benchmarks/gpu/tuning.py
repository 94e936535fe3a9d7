"""polish and finetune streamed: what is trained waits in the host's memory, or on disk where that is
too little."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ppcl_engine.settings.base_settings import TuningConfig
from ppcl_engine.settings.prune_settings import FinetuneConfig, PolishConfig
from ppcl_engine.stages.prune.finetune import finetune
from ppcl_engine.stages.prune.polish import polish
from ppcl_engine.system.machine import PeakMemory, free_memory

from .card import GB, Card
from .runs import DTYPE, copied_students, prepared
from .scale import Scale
from .table import Line

GOAL = 24 * GB
OFFLOAD = "offload"
"""the setting of a stage that does not keep on the device what it trains"""
HOST = 64 * GB
"""free, or what is trained goes to disk"""
NOT_STREAMED = {"cut": "this version keeps all that it trains on the device"}


def rows(card: Card, scale: Scale, folder: Path) -> dict[str, Callable[[], dict]]:
    variant = scale.training.tuned[1].replace(" ", ",")
    measured = partial(measure, card, scale, folder)
    return {
        "polish, streamed": partial(measured, polish, PolishConfig),
        "finetune, streamed": partial(
            measured, finetune, FinetuneConfig, variant=variant, name="tuned"
        ),
    }


def measure(
    card: Card,
    scale: Scale,
    folder: Path,
    stage: Callable,
    settings: type[TuningConfig],
    **chosen: str,
) -> dict:
    """Seconds a step of the whole stage, opening and saving included."""
    if OFFLOAD not in settings.__dataclass_fields__:
        return NOT_STREAMED
    training, offload = scale.training, "memory" if free_memory() > HOST else "disk"
    blocks, intervals = training.tuned
    with tempfile.TemporaryDirectory(dir=folder) as name:
        made = prepared(Path(name), scale, blocks, intervals)
        copied_students(made, intervals)
        config = settings(
            model=made.model,
            run=made.run.folder,
            device=card.device,
            dtype=DTYPE,
            streamed=True,
            steps=training.tuning_steps,
            save_every=training.tuning_steps,
            **{OFFLOAD: offload},
            **chosen,
        )
        memory = PeakMemory(card.device)
        seconds = card.seconds(lambda: stage(config))
        peak = memory.above_start()
    return {
        "seconds": seconds / training.tuning_steps,
        "peak": peak,
        "blocks": blocks,
        "steps": training.tuning_steps,
        "offload": offload,
    }


def lines(measured: dict[str, dict]) -> list[Line]:
    return [_line(name, row) for name, row in measured.items()]


def _line(name: str, row: dict) -> Line:
    if "cut" in row:
        return Line.of(name, row)
    note = f"{row['blocks']} blocks, {row['steps']} steps with opening and saving, offload {row['offload']}"
    if row["peak"] > GOAL:
        note += f"; above {GOAL / GB:g} GB"
    return Line.of(name, row, note)
