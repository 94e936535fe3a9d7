"""Opens what stages start from: the teacher, the calibration set, the plan."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..data.calibration import CalibrationSet, load_calibration
from ..models.layout import checked
from ..models.model_configs import check_model_config, check_same_sizes
from ..models.streaming import Teacher
from ..models.weights import Weights
from ..plan import PruningPlan
from ..run import Run
from ..settings.base_settings import Common, StatesConfig, TuningConfig
from ..system.distributed import processes
from ..system.machine import DTYPES, resolve_device


def open_teacher(config: Common) -> Teacher:
    torch.manual_seed(config.seed)
    device, target_only = resolve_device(config.device), _target_only(config)
    return Teacher(
        Weights(config.model), DTYPES[config.dtype], device, config.streamed, target_only
    )


def _target_only(config: Common) -> bool:
    return isinstance(config, StatesConfig) and config.target_tokens_only


def open_calibration(config: Common, weights: Weights) -> CalibrationSet:
    """The run's calibration set; if several processes share the batches, this process's rows of it.
    Raises ValueError if a batch has fewer samples than there are processes."""
    path = Run(config.run).calibration
    calibration, sharing = load_calibration(path), processes()
    calibration.check_model(weights.architecture.name, weights.fingerprint, path)
    fewest = min(len(batch["timestep"]) for batch in calibration.batches)
    if sharing.by_rows and fewest < sharing.count:
        intervals = "" if isinstance(config, TuningConfig) else ", or use --parallel intervals"
        raise ValueError(
            f"{path} has a batch of {fewest} samples for {sharing.count} processes; calibrate with a larger --batch, or "
            f"launch fewer processes{intervals}"
        )
    if _target_only(config):  # it changes the hash: no stage resumes from files made the other way
        calibration = replace(
            calibration, origin={**calibration.origin, "target_tokens_only": True}
        )
    return replace(calibration, rows=sharing.rows)


def open_plan(config: Common, weights: Weights) -> PruningPlan:
    run = Run(config.run)
    plan = run.load_plan()
    plan.check_teacher(weights.architecture.name, weights.fingerprint, config.model)
    checked(plan)
    check_model_config(plan.architecture, plan.config, run.plan)
    check_same_sizes(plan.config, weights.config, run.plan)
    return plan
