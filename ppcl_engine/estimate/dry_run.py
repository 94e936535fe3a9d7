"""What a stage would take on this machine, from the configuration alone: no weights, no trial
run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..models.cost import CostModel
from ..models.opening import model_config
from ..settings.base_settings import TuningConfig
from ..settings.convert_settings import JobConfig, MergeConfig
from ..settings.prune_settings import CalibrateConfig
from ..system.machine import device_memory, free_disk, resolve_device
from .advice import STREAMED, last_advice, setting_advice
from .counts import GRID, TEXT_TOKENS
from .merging import print_merge
from .needs import DEMANDS, Needs, needs

LAUNCHES = (2, 4, 8)  # processes that a training is shown divided among
COLUMNS = (
    "GB memory",
    "for certain",
    "GB of host",
    "GB of files",
    "GB read",
    "GB written",
    "hours",
)
# where a stage has no advice of its own
FITTING = {"streamed": STREAMED[-1], "dtype": "choose dtype bfloat16"}


def print_estimate(config: JobConfig | MergeConfig) -> None:
    if isinstance(config, MergeConfig):
        print_merge(config)
        return
    name, architecture, settings = model_config(config.model)
    device = resolve_device(config.device)
    blocks = architecture.num_blocks(settings)
    cost = CostModel(architecture, settings, GRID, TEXT_TOKENS)
    parameters = cost.outer_parameters + sum(block.parameters for block in cost.blocks())
    print(f"{name}: {architecture.name}, {blocks} blocks, {parameters / 1e9:.2f} B parameters")
    free = free_disk(config.run) / 1e9
    print(
        f"on disk: {parameters * 2 / 1e9:.1f} GB in bf16, {parameters * 4 / 1e9:.1f} GB in fp32; {free:.0f} GB are free"
    )
    _print_needs(config, device)
    if line := refusal(config):
        print(f"as a job it would be refused: {line}")


def _print_needs(config: JobConfig, device: str) -> None:
    rows = {
        name: needs(replace(config, streamed=streamed))
        for name, streamed in (("resident", False), ("streamed", True))
    }
    launches = {f"{n} processes": needs(config, processes=n) for n in _launches(config)}
    rows |= launches
    stage, there = rows["resident"].stage, device_memory(device)
    print(f"{stage} with these settings and this run's samples, on {device} in {config.dtype}:")
    _print_header()
    for name, row in rows.items():
        fits = "yes" if row.at_least <= there else f"no: {there / 1e9:.0f} GB are there"
        _print_row(name, row, f"  {fits}")
    if launches:
        print(
            "processes: what each needs, on a device of its own; hours leave out what they exchange"
        )


def _launches(config: JobConfig) -> Sequence[int]:
    """Numbers of processes that can share the stage and need less the more they are."""
    if not isinstance(config, TuningConfig) or config.parallel != "shard":
        return ()
    return () if config.unshardable else LAUNCHES


def print_estimates(stages: Sequence[tuple[str, object]]) -> None:
    """Prints a row for each stage of a run file, and what all of them read, write and compute."""
    configs = [config for _, config in stages if isinstance(config, JobConfig)]
    configs = [config for config in configs if type(config) in DEMANDS]
    if not configs:
        raise ValueError("none of these stages has an estimate; name one of the method's stages")
    calibrate = next((c for c in configs if isinstance(c, CalibrateConfig)), None)
    rows = [needs(config, calibrate) for config in configs]
    there = device_memory(resolve_device(configs[0].device))
    print(f"{configs[0].model} on this machine, with {there / 1e9:.0f} GB of memory on the device:")
    _print_header()
    for row in rows:
        _print_row(row.stage, row, "" if row.at_least <= there else "  does not fit")
    read, written, flops, seconds = (
        sum(getattr(row, name) for row in rows) for name in ("read", "written", "flops", "seconds")
    )
    print(
        f"together: {read / 1e12:.2f} TB read, {written / 1e12:.2f} TB written, {flops:.2g} FLOPs, "
        f"{seconds / 3600:.1f} hours here"
    )


def _print_header() -> None:
    print(f"{'':13} " + " ".join(f"{name:>11}" for name in COLUMNS))


def _print_row(name: str, row: Needs, end: str) -> None:
    sizes = (row.memory, row.at_least, row.host, row.disk, row.read, row.written)
    cells = [f"{size / 1e9:>11.1f}" for size in sizes]
    print(f"{name:13} {' '.join(cells)} {row.seconds / 3600:>11.2f}{end}")


def refusal(
    config: JobConfig, calibrate: CalibrateConfig | None = None, processes: int = 1
) -> str | None:
    """Why the stage cannot run on this machine, in a line that names what to change; None when it
    may fit.

    `calibrate`: of the same job, where its calibration is not there yet. `processes`: those that
    were launched together.
    """
    device, wanted = resolve_device(config.device), needs(config, calibrate, processes)
    there, free = device_memory(device), free_disk(config.run)
    if wanted.at_least > there:
        return (
            f"{wanted.stage} needs {wanted.at_least / 1e9:.1f} GB of memory or more on {device}, {there / 1e9:.1f} GB are "
            f"there: {_what_fits(config, calibrate, there, processes)}"
        )
    if wanted.disk > free:
        return (
            f"{wanted.stage} writes {wanted.disk / 1e9:.1f} GB or more, {free / 1e9:.1f} GB are free at {config.run}: "
            "free space, or use a folder on another disk"
        )
    return None


def _what_fits(
    config: JobConfig, calibrate: CalibrateConfig | None, there: int, processes: int
) -> str:
    """The change after which it may."""
    changes = ({"streamed": True}, {"dtype": "bfloat16"}, {"streamed": True, "dtype": "bfloat16"})
    for change in changes:
        if needs(replace(config, **change), calibrate, processes).at_least <= there:
            return " and ".join(setting_advice(config, name) or FITTING[name] for name in change)
    return f"{last_advice(config)}, or use a device with more memory"
