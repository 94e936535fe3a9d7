"""A run folder: the files between stages, and what every stage opens first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .architectures import Architecture
from .checkpoint import Weights
from .config import Common, StatesConfig
from .data import CalibrationSet, load_calibration
from .files import TensorFile
from .layout import checked
from .parallel import processes
from .plan import Interval, PruningPlan, plan_from_json
from .streaming import Teacher
from .surgery import filled_student
from .training import file_mark, saved_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Run:
    """Names of the files in a run folder. Stages exchange these and nothing else."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.calibration = self.folder / "calibration.safetensors"
        self.probes = self.folder / "probes"
        self.curves = self.folder / "curves.safetensors"
        self.detection = self.folder / "detect.json"
        self.plan = self.folder / "plan.json"
        self.students = self.folder / "depth"
        self.projections = self.folder / "width"
        self.width = self.folder / "width.json"
        self.alignment = self.folder / "alignment.safetensors"
        self.tuned = self.folder / "tuned"
        self.polished_parts = self.folder / "polished"
        self.sparsified = self.folder / "sparsified"
        self.polish_state = self.polished_parts / "state.safetensors"
        self.evaluation = self.folder / "evaluate.json"
        self.report = self.folder / "report.html"
        self.states = self.folder / "states"

    def load_plan(self) -> PruningPlan:
        if not self.plan.exists():
            raise ValueError(f"{self.plan} does not exist; run detect first")
        return plan_from_json(self.plan.read_text(encoding="utf-8"), self.plan)

    def probe(self, block: int) -> Path:
        return self.probes / f"block_{block:03d}.safetensors"

    def student(self, interval: str) -> Path:
        return self.students / f"{interval}.safetensors"

    def projection(self, place: str, kind: str) -> Path:
        return self.projections / f"{place}.{kind}.safetensors"

    def polished(self, trained: Path) -> Path:
        """Where the polished form of a student or projection is, if there is one."""
        return self.polished_parts / trained.relative_to(self.folder)

    def best(self, trained: Path) -> Path:
        """The polished form of a student or projection; itself where there is none, or only one of an earlier training."""
        polished = self.polished(trained)
        if not (polished.exists() and trained.exists()):
            return trained
        return polished if TensorFile(polished).metadata["source"] == file_mark(trained) else trained

    def tuned_variant(self, name: str) -> Path:
        return self.tuned / f"{name}.safetensors"


def resolve_device(device: str) -> str:
    """Raises ValueError when a device is asked for that this machine does not have."""
    if device == "auto":
        return processes().gpu if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device} is not on this machine; use --device cpu")
    if device.startswith("cuda:") and processes().count > 1:
        raise ValueError(f"device {device} is one for {processes().count} processes; use --device cuda, one for each")
    return processes().gpu if device == "cuda" else device


def open_teacher(config: Common) -> Teacher:
    torch.manual_seed(config.seed)
    device, target_only = resolve_device(config.device), _target_only(config)
    return Teacher(Weights(config.model), DTYPES[config.dtype], device, config.streamed, target_only)


def _target_only(config: Common) -> bool:
    return isinstance(config, StatesConfig) and config.target_tokens_only


def open_calibration(config: Common, weights: Weights) -> CalibrationSet:
    """Of this process's rows, if several share the batches. Raises ValueError when a batch has too few for them."""
    path = Run(config.run).calibration
    calibration, sharing = load_calibration(path), processes()
    calibration.check_model(weights.architecture.name, weights.fingerprint, path)
    fewest = min(len(batch["timestep"]) for batch in calibration.batches)
    if sharing.by_rows and fewest < sharing.count:
        raise ValueError(
            f"{path} has a batch of {fewest} samples for {sharing.count} processes; calibrate with a larger --batch, "
            "launch fewer processes, or use --parallel intervals"
        )
    if _target_only(config):  # into its hash: no stage goes on from what was made the other way
        calibration = replace(calibration, origin={**calibration.origin, "target_tokens_only": True})
    return replace(calibration, rows=sharing.rows)


def open_plan(config: Common, weights: Weights) -> PruningPlan:
    plan = Run(config.run).load_plan()
    plan.check_teacher(weights.architecture.name, weights.fingerprint, config.model)
    return checked(plan)


def load_probe(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """stream -> (weight, bias). Raises ValueError when the probe is missing."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; run probe first")
    file = TensorFile(path)
    streams = [name.split(".")[0] for name in file.keys() if name.endswith(".weight")]
    return {stream: (file.read(f"{stream}.weight"), file.read(f"{stream}.bias")) for stream in streams}


class RunStudents:
    """Trained parts of a run in the place of a bundle's; `polished` ones where there are such."""

    def __init__(self, run: Run, config: dict, architecture: Architecture, polished: bool = True):
        self.run, self.config, self.architecture = run, config, architecture
        self._file = run.best if polished else (lambda trained: trained)

    def student(self, interval: Interval, dtype: torch.dtype, device: str) -> nn.Module:
        saved = saved_weights(self._file(self.run.student(interval.name)), "distill-depth")
        state = {name: tensor.to(device, dtype) for name, tensor in saved.items()}
        return filled_student(self.architecture, self.config, interval, state)

    def projection(self, place: str, kind: str, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
        saved = saved_weights(self._file(self.run.projection(place, kind)), "distill-width")
        return {name: tensor.to(device, dtype) for name, tensor in saved.items()}

    def tuned(self, variant: str, key: str) -> torch.Tensor:
        path = self.run.tuned_variant(variant)
        if not path.exists():
            raise ValueError(f"{path} does not exist; run finetune first")
        return TensorFile(path).read(f"weight.{key}")
