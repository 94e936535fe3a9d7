"""The bundle, `*.ppcl.safetensors`: students, projections and tuned variants, with the plan in its
metadata.

By teacher index: `students.<interval>.*`, `projections.<place>.<kind>.*`, and for every fine-tuned
variant all its tensors as `tuned.<variant>.*`.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ..architectures import architecture_named
from ..plan import Interval, PruningPlan, plan_from_json
from ..system.gguf_files import is_gguf
from ..system.tensor_files import TensorEntry, TensorFile, write_tensor_stream
from .bundle_contents import projection_prefix, student_prefix, tuned_prefix
from .layout import checked
from .model_configs import check_model_config, check_same_sizes
from .real_values import RealValues
from .surgery import filled_student
from .teacher_hashes import TEACHER_KEY, ExpectedBase, Recorded
from .weights import Weights

PLAN_KEY = "ppcl_plan"
MAP_KEY = "ppcl_block_map"
BUNDLE_SUFFIX = ".ppcl.safetensors"


class Bundle:
    """`*.ppcl.safetensors`, opened. Raises ValueError for a file without a plan."""

    kind = "bundle"

    def __init__(self, path: Path):
        self.path = Path(path)
        self.file = TensorFile(path)
        if PLAN_KEY not in self.file.metadata:
            raise ValueError(f"{path} holds no pruning plan, so it is not a PPCL bundle")
        self.plan: PruningPlan = checked(plan_from_json(self.file.metadata[PLAN_KEY], path))
        check_model_config(self.plan.architecture, self.plan.config, path)
        self.architecture = architecture_named(self.plan.architecture)
        self.config, self.num_blocks = self.plan.config, self.plan.num_blocks

    @property
    def variant_names(self) -> list[str]:
        """All that can be opened, the full model first."""
        return ["full", *(v.name for v in self.plan.variants if v.name != "full")]

    @cached_property
    def tensors(self) -> RealValues:
        """All tensors as numbers."""
        return RealValues(self.file)

    @cached_property
    def expected_base(self) -> ExpectedBase | None:
        """What is known of the base's tensors; None for older bundles, which did not keep it."""
        recorded = (
            self.file.about(TEACHER_KEY, Recorded) if TEACHER_KEY in self.file.metadata else None
        )
        return (
            None if recorded is None else ExpectedBase(self.file.path, self.file.identity, recorded)
        )

    def check_base(self, weights: Weights, where: object) -> None:
        """Raises ValueError for a model that is not the plan's teacher, now or when one of its
        tensors is read and differs; warns of what cannot be compared."""
        self.plan.check_teacher(weights.architecture.name, weights.fingerprint, where)
        check_same_sizes(self.plan.config, weights.config, self.file.path)
        for note in weights.expect(self.expected_base):
            warnings.warn(note, stacklevel=3)

    def student(self, interval: Interval, dtype: torch.dtype, device: str) -> nn.Module:
        state = self._under(student_prefix(interval), dtype, device)
        return filled_student(self.architecture, self.plan.config, interval, state, self.file.path)

    def projection(
        self, place: str, kind: str, dtype: torch.dtype, device: str
    ) -> dict[str, torch.Tensor]:
        return self._under(projection_prefix(place, kind), dtype, device)

    def tuned(self, variant: str, key: str) -> torch.Tensor:
        return self.tensors.read(tuned_prefix(variant) + key)

    def _under(self, prefix: str, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
        names = [key for key in self.tensors.keys() if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.tensors.read(key).to(device, dtype) for key in names}


def write_bundle(
    path: Path, plan: PruningPlan, entries: list[TensorEntry], teacher: str | None = None
) -> None:
    """Writes a bundle; memory holds one tensor at a time.

    entries: named by the prefixes above. teacher: `teacher_hashes` of the base.
    """
    known = {} if teacher is None else {TEACHER_KEY: teacher}
    write_tensor_stream(path, entries, {PLAN_KEY: plan.to_json(), "format": "pt", **known})


def is_bundle(path: Path) -> bool:
    return Path(path).is_file() and not is_gguf(path) and PLAN_KEY in TensorFile(path).metadata
