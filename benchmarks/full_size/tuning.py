"""What one step of finetune is tried on: a variant of as many blocks as the disk has room to train."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from ppcl_engine.models.weights import Weights, expected_shapes
from ppcl_engine.plan import Interval, PruningPlan, Variant
from ppcl_engine.run import Run
from ppcl_engine.system.atomic import write_text

VARIANT = "pruned"
WAITING = 4 + 2 * (1 + 4 / 256)  # bytes a parameter: its weight, and moments in 8 bits with scales
STUDENT = 3 * 4  # bytes a parameter of the student's own training
ROOM = 0.85  # of what is free
PUBLISHED = 35 / 60  # blocks of the 10 B model


def prepare(model: Path, run: Path, calibration: Path) -> None:
    """A run folder whose plan replaces the blocks in the middle by one; what is there stays."""
    folder = Run(run)
    if folder.plan.exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    shutil.copy(calibration, folder.calibration)
    weights = Weights(model)
    trained = blocks_in_room(weights, ROOM * shutil.disk_usage(run).free)
    removed = weights.num_blocks - trained
    first = (trained - 1) // 2
    interval = Interval(first=first, last=first + removed)
    plan = PruningPlan(
        architecture=weights.architecture.name,
        config=weights.config,
        num_blocks=weights.num_blocks,
        fingerprint=weights.fingerprint,
        intervals=(interval,),
    )
    write_text(folder.plan, plan.to_json())


def name_variant(run: Path) -> None:
    """As `variants` would, which measures the model first."""
    plan = Run(run).load_plan()
    variant = Variant(name=VARIANT, intervals=tuple(i.name for i in plan.intervals))
    write_text(Run(run).plan, plan.with_parts(variants=(variant,)).to_json())


def blocks_in_room(weights: Weights, room: float) -> int:
    """Blocks of the variant, its student among them: no more than the paper's smallest has."""
    one, two = (parameters(weights, blocks) for blocks in (1, 2))
    block, outer = two - one, 2 * one - two
    fit = (room - STUDENT * block - WAITING * outer) / (WAITING * block)
    return max(2, min(int(fit), round(PUBLISHED * weights.num_blocks)))


def parameters(weights: Weights, blocks: int) -> int:
    config = {**weights.config, "num_layers": blocks}
    return sum(map(math.prod, expected_shapes(weights.architecture, config).values()))
