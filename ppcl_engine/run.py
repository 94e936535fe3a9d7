"""A run folder: the names of the files between stages."""

from __future__ import annotations

from pathlib import Path

from .plan import PruningPlan, plan_from_value
from .system.atomic import read_object
from .system.tensor_files import TensorFile, file_mark


class Run:
    """The names of the files in a run folder. Stages exchange these files and nothing else."""

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
        self.loras = self.folder / "loras"
        self.lora_fits = self.folder / "lora_fits"
        self.bits = self.folder / "bits"
        self.sparsified = self.folder / "sparsified"
        self.polish_state = self.polished_parts / "state.safetensors"
        self.evaluation = self.folder / "evaluate.json"
        self.report = self.folder / "report.html"
        self.benchmarks = self.folder / "benchmarks"
        self.benchmark_page = self.folder / "benchmarks.html"
        self.states = self.folder / "states"

    def load_plan(self) -> PruningPlan:
        """Raises ValueError if there is no plan, or if it cannot be applied."""
        if not self.plan.exists():
            raise ValueError(f"{self.plan} does not exist; run detect first")
        return plan_from_value(read_object(self.plan), self.plan)

    def probe(self, block: int) -> Path:
        return self.probes / f"block_{block:03d}.safetensors"

    def student(self, interval: str) -> Path:
        return self.students / f"{interval}.safetensors"

    def projection(self, place: str, kind: str) -> Path:
        return self.projections / f"{place}.{kind}.safetensors"

    def polished(self, trained: Path) -> Path:
        """The path of a student's or projection's polished form, whether it exists or not."""
        return self.polished_parts / trained.relative_to(self.folder)

    def best(self, trained: Path) -> Path:
        """The polished form of a student or projection; without one, or with one of an earlier
        training, the trained form."""
        polished = self.polished(trained)
        if not (polished.exists() and trained.exists()):
            return trained
        return polished if TensorFile(polished).text("source") == file_mark(trained) else trained

    def benchmark(self, name: str) -> Path:
        """What was found with a benchmark; beside it, a folder of that name holds the pictures."""
        return self.benchmarks / f"{name}.json"

    def lora(self, name: str) -> Path:
        """An adapted LoRA."""
        return self.loras / f"{name}.safetensors"

    def lora_fit(self, name: str, place: str) -> Path:
        """The pairs of one place of it, in training."""
        return self.lora_fits / name / f"{place}.safetensors"

    def tuned_variant(self, name: str) -> Path:
        return self.tuned / f"{name}.safetensors"
