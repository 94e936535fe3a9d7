"""What a whole job would take on this machine, before it is started: time, memory, new files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..settings.convert_settings import JobConfig
from ..settings.presets import PRESETS, QUALITIES, preset
from ..settings.prune_settings import CalibrateConfig
from ..system.machine import device_memory, free_disk, resolve_device
from ..system.numbers import bytes_text, duration_text
from .dry_run import refusal
from .needs import Needs, needs

COLUMNS = ("", "time", "memory", "files")


@dataclass(frozen=True)
class Budget:
    """The needs of a job's stages, added up."""

    configs: Sequence[JobConfig]
    """the stages' settings, in order; the time of a stage that is already done counts too"""

    @cached_property
    def needs(self) -> list[Needs]:
        return [needs(config, self._calibrate) for config in self.configs]

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.needs)

    @property
    def memory(self) -> int:
        """Bytes of the device, in the stage that takes most."""
        return max(row.memory for row in self.needs)

    @property
    def files(self) -> int:
        """Bytes of new files that are certain."""
        return sum(row.disk for row in self.needs)

    @cached_property
    def refusal(self) -> str:
        """Why it cannot run here; "" where it may."""
        for config in self.configs:
            if line := refusal(config, self._calibrate):
                return line
        free = free_disk(self.configs[0].run)
        if self.files > free:
            return f"its files take {bytes_text(self.files)} or more, {bytes_text(free)} are free: free space"
        return ""

    @property
    def line(self) -> str:
        """All of it, in a line."""
        device = resolve_device(self.configs[0].device)
        there, free = device_memory(device), free_disk(self.configs[0].run)
        return (
            f"about {duration_text(self.seconds)} on {device}, {bytes_text(self.memory)} of {bytes_text(there)} of memory, "
            f"{bytes_text(self.files)} of files ({bytes_text(free)} are free)"
        )

    @property
    def table(self) -> list[tuple[str, ...]]:
        """A row of texts for each stage, below COLUMNS; the last row is the job."""
        rows = [
            (row.stage, duration_text(row.seconds), bytes_text(row.memory), bytes_text(row.disk))
            for row in self.needs
        ]
        whole = (duration_text(self.seconds), bytes_text(self.memory), bytes_text(self.files))
        return [COLUMNS, *rows, ("all of it", *whole)]

    @property
    def _calibrate(self) -> CalibrateConfig | None:
        return next((c for c in self.configs if isinstance(c, CalibrateConfig)), None)


def budgets_by_quality(configs: Sequence[JobConfig], stages: Sequence[str]) -> dict[str, Budget]:
    """The same job with each preset; empty if none of its stages has one. stages: name of each."""
    if not PRESETS.keys() & set(stages):
        return {}
    return {
        quality: Budget([_with(c, s, quality) for c, s in zip(configs, stages, strict=True)])
        for quality in QUALITIES
    }


def _with(config: JobConfig, stage: str, quality: str) -> JobConfig:
    return replace(config, **preset(stage, quality)) if stage in PRESETS else config
