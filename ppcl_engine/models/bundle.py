"""The bundle, `*.ppcl.safetensors`: students, projections and tuned variants, with the plan in its
metadata.

By teacher index: `students.<interval>.*`, `projections.<place>.<kind>.*`, and for every fine-tuned
variant all its tensors as `tuned.<variant>.*`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..architectures import architecture_named
from ..plan import Interval, PruningPlan, plan_from_json
from ..system.tensor_files import TensorEntry, TensorFile, write_tensor_stream
from .layout import checked
from .surgery import filled_student

PLAN_KEY = "ppcl_plan"
MAP_KEY = "ppcl_block_map"
BUNDLE_SUFFIX = ".ppcl.safetensors"


class Bundle:
    """`*.ppcl.safetensors`, opened. Raises ValueError for a file without a plan."""

    def __init__(self, path: Path):
        self.file = TensorFile(path)
        if PLAN_KEY not in self.file.metadata:
            raise ValueError(f"{path} holds no pruning plan, so it is not a PPCL bundle")
        self.plan: PruningPlan = checked(plan_from_json(self.file.metadata[PLAN_KEY], path))
        self.architecture = architecture_named(self.plan.architecture)

    def student(self, interval: Interval, dtype: torch.dtype, device: str) -> nn.Module:
        state = self._under(student_prefix(interval), dtype, device)
        return filled_student(self.architecture, self.plan.config, interval, state)

    def projection(
        self, place: str, kind: str, dtype: torch.dtype, device: str
    ) -> dict[str, torch.Tensor]:
        return self._under(projection_prefix(place, kind), dtype, device)

    def tuned(self, variant: str, key: str) -> torch.Tensor:
        return self.file.read(tuned_prefix(variant) + key)

    def _under(self, prefix: str, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
        names = [key.removeprefix(prefix) for key in self.file.keys() if key.startswith(prefix)]
        return {name: self.file.read(prefix + name).to(device, dtype) for name in names}


def student_prefix(interval: Interval) -> str:
    return f"students.{interval.name}."


def projection_prefix(place: str, kind: str) -> str:
    return f"projections.{place}.{kind}."


def tuned_prefix(variant: str) -> str:
    return f"tuned.{variant}."


def write_bundle(path: Path, plan: PruningPlan, entries: list[TensorEntry]) -> None:
    """entries: named by the prefixes above; memory holds one tensor at a time."""
    write_tensor_stream(path, entries, {PLAN_KEY: plan.to_json(), "format": "pt"})


def is_bundle(path: Path) -> bool:
    return Path(path).is_file() and PLAN_KEY in TensorFile(path).metadata
