"""Files of a random model of few blocks at the real width, and run folders that stages go on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ppcl_engine.data.calibration import CLEAN, CalibrationSet, save_calibration
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import PruningPlan, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.system.atomic import write_text
from ppcl_engine.system.tensor_files import write_tensors

from ..full_size.model import random_model
from ..shared.teachers import origin
from .models import QWEN, grid_of
from .scale import Scale

DTYPE = "bfloat16"
"""of the teacher's blocks in every stage"""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    model: Path
    """the teacher's file, in fp8"""
    run: Run
    """with a calibration set and a plan"""


def prepared(folder: Path, scale: Scale, blocks: int, intervals: str = "") -> Prepared:
    """Reading fp8 costs a cast and half of the bytes that bf16 has."""
    training = scale.training
    model, run = folder / f"model_{blocks}.safetensors", Run(folder / "run")
    random_model(model, {**scale.config, "num_layers": blocks})
    weights = Weights(model)
    torch.manual_seed(0)
    batches = [
        QWEN.random_inputs(
            weights.config, training.batch, grid_of(training.side), training.text_tokens, "cpu"
        )
        for _ in range(training.batches)
    ]
    for batch in batches:
        batch[CLEAN] = torch.randn_like(batch["hidden_states"])
    save_calibration(run.calibration, CalibrationSet(batches, origin(weights)))
    plan = PruningPlan(
        architecture=QWEN.name,
        config=weights.config,
        num_blocks=blocks,
        fingerprint=weights.fingerprint,
        intervals=parse_intervals(intervals),
    )
    write_text(run.plan, plan.to_json())
    return Prepared(model=model, run=run)


def copied_students(made: Prepared, intervals: str) -> None:
    """Students as they are before their training: copies of the first blocks."""
    weights = Weights(made.model)
    for interval in parse_intervals(intervals):
        block = weights.block(interval.first, torch.float32, "cpu").state_dict()
        tensors = {f"weight.{name}": tensor for name, tensor in block.items()}
        write_tensors(made.run.student(interval.name), tensors, {"settings": "{}", "step": "0"})
