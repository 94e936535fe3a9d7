"""Seconds of detect, and what they say of a model of all blocks.

Two models of few blocks give the time of a block pass and that of a least-squares map; both are
counted for any number of blocks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ppcl_engine.algorithms.detection.curves import block_passes
from ppcl_engine.algorithms.detection.intervals import pairs
from ppcl_engine.settings.prune_settings import DetectConfig, ProbeConfig
from ppcl_engine.stages.prune.detect import detect
from ppcl_engine.stages.prune.probe import probe
from ppcl_engine.system.machine import DTYPES, PeakMemory, flops_a_second

from .card import Card
from .runs import DTYPE, prepared
from .scale import Scale
from .table import Line

ALL_BLOCKS = 60
CURVES = 2


def rows(card: Card, scale: Scale, folder: Path) -> dict[str, Callable[[], dict]]:
    return {
        f"{blocks} blocks": partial(measure, card, scale, folder, blocks)
        for blocks in scale.training.detected
    }


def measure(card: Card, scale: Scale, folder: Path, blocks: int) -> dict:
    """Resident; the probes that it reads are made before."""
    training = scale.training
    with tempfile.TemporaryDirectory(dir=folder) as name:
        made = prepared(Path(name), scale, blocks)
        common = {
            "model": made.model,
            "run": made.run.folder,
            "device": card.device,
            "dtype": DTYPE,
        }
        probe(ProbeConfig(**common, train_steps=0))
        warm(card)
        memory = PeakMemory(card.device)
        samples = training.batch * training.batches
        config = DetectConfig(**common, longest=training.longest, samples=samples)
        seconds = card.seconds(lambda: detect(config))
    return {
        "seconds": seconds,
        "peak": memory.above_start(),
        "samples": samples,
        **work(blocks, training.longest),
    }


def warm(card: Card) -> None:
    """Loads the libraries that products and solutions need, which takes seconds the first time."""
    flops_a_second(card.device, DTYPES[DTYPE])
    torch.linalg.cholesky(torch.eye(64, device=card.device, dtype=torch.float64))
    card.settle()


def work(blocks: int, longest: int) -> dict:
    """What detect does: block passes a batch, and maps that are fitted."""
    return {
        "passes": block_passes(blocks, longest, CURVES),
        "maps": len(pairs(blocks, longest)),
        "longest": longest,
    }


def extrapolated(few: dict, more: dict) -> dict:
    """The row of a model of all blocks: seconds = passes * a + maps * b, a and b from the two that
    were measured."""
    whole = work(ALL_BLOCKS, more["longest"])
    matrix = torch.tensor([[row["passes"], row["maps"]] for row in (few, more)]).double()
    seconds = torch.tensor([row["seconds"] for row in (few, more)]).double()
    costs = torch.linalg.solve(matrix, seconds)
    if costs.min() < 0:
        return {"cut": "the two times do not tell block passes and maps apart"}
    return {"seconds": float(costs @ torch.tensor([whole["passes"], whole["maps"]]).double())}


def lines(measured: dict[str, dict]) -> list[Line]:
    found = [
        Line.of(name, row, f"{row.get('samples')} samples, resident")
        for name, row in measured.items()
    ]
    few, more = measured.values()
    if "cut" in few or "cut" in more:
        whole = {"cut": "one of the two was"}
    else:
        whole = extrapolated(few, more)
    return [
        *found,
        Line.of(f"{ALL_BLOCKS} blocks", whole, "extrapolated, without reading the file"),
    ]
