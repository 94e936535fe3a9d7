"""What a stage would take on this machine, from the configuration alone: no weights, no trial
run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..algorithms.distillation.rounds import REUSE
from ..models.cost import CostModel, largest_pair
from ..models.opening import model_config
from ..plan import Interval
from ..settings.base_settings import Common, TuningConfig
from ..settings.convert_settings import SparsifyConfig
from ..settings.prune_settings import CalibrateConfig
from ..system.machine import DTYPES, device_memory, flops_a_second, free_disk, resolve_device
from .advice import STREAMED, last_advice, setting_advice
from .counts import ACTIVATIONS_PER_TOKEN, FP32, GRID, OPTIMISER_COPIES, TEXT_TOKENS, TUNING_COPIES
from .needs import needs

# where a stage has no advice of its own
FITTING = {"streamed": STREAMED[-1], "dtype": "choose dtype bfloat16"}


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of distilling depth with this many samples an update."""

    name: str
    device_bytes: int
    host_bytes: int
    seconds_a_step: float
    fits: bool


def estimate(cost: CostModel, dtype: torch.dtype, device: str) -> list[Estimate]:
    """Resident and streamed, with one student in training, of the largest block."""
    blocks, size = cost.blocks(), dtype.itemsize
    sizes = [block.parameters for block in blocks]
    first = sizes.index(max(sizes))
    student = cost.student(Interval(first=first, last=first + 1, correction="affine"))
    tokens = math.prod(GRID) + TEXT_TOKENS
    activations = tokens * cost.architecture.width(cost.config) * ACTIVATIONS_PER_TOKEN * size
    training = OPTIMISER_COPIES * student.parameters * FP32 + activations
    sweep = sum(block.flops for block in blocks)
    seconds = (3 * student.flops + sweep / REUSE) / flops_a_second(device, dtype)
    rows = []
    for name, held in (("resident", sum(sizes)), ("streamed", largest_pair(sizes))):
        needed = (cost.outer_parameters + held) * size + training
        host = needed if device == "cpu" else largest_pair(sizes) * size
        rows.append(Estimate(name, needed, host, seconds, needed <= device_memory(device)))
    return rows


def print_estimate(config: Common | SparsifyConfig) -> None:
    name, architecture, settings = model_config(config.model)
    device, dtype = resolve_device(config.device), DTYPES[config.dtype]
    blocks = architecture.num_blocks(settings)
    cost = CostModel(architecture, settings, GRID, TEXT_TOKENS)
    parameters = cost.outer_parameters + sum(block.parameters for block in cost.blocks())
    print(f"{name}: {architecture.name}, {blocks} blocks, {parameters / 1e9:.2f} B parameters")
    free = free_disk(config.run) / 1e9
    print(
        f"on disk: {parameters * 2 / 1e9:.1f} GB in bf16, {parameters * 4 / 1e9:.1f} GB in fp32; {free:.0f} GB are free"
    )
    if not isinstance(config, SparsifyConfig):  # which trains nothing
        _print_distilling(estimate(cost, dtype, device), device, config.dtype)
    if isinstance(config, TuningConfig):
        print(_tuning_note(parameters))
    wanted = needs(config)
    print(
        f"{wanted.stage} with these settings and this run's samples: {wanted.memory / 1e9:.1f} GB of memory "
        f"({wanted.at_least / 1e9:.1f} for certain), {wanted.disk / 1e9:.1f} GB of new files, {wanted.seconds / 3600:.1f} h"
    )
    if line := refusal(config):
        print(f"as a job it would be refused: {line}")


def _print_distilling(rows: list[Estimate], device: str, dtype: str) -> None:
    print(f"distil depth on {device} in {dtype}, one sample of 1024 x 1024 an update:")
    print(f"{'':10} {'device GB':>10} {'host GB':>10} {'s a step':>10}  fits")
    for row in rows:
        fits = "yes" if row.fits else f"no: {device_memory(device) / 1e9:.0f} GB here"
        print(
            f"{row.name:10} {row.device_bytes / 1e9:>10.1f} {row.host_bytes / 1e9:>10.1f} {row.seconds_a_step:>10.1f}  {fits}"
        )


def _tuning_note(parameters: int) -> str:
    """Weights, gradient, two moments and average, all float32."""
    size = TUNING_COPIES * FP32
    return (
        f"tuning on the velocity takes more: {size} bytes a trained parameter, {parameters * size / 1e9:.0f} GB if "
        "that is the whole model, and what all blocks keep for their gradients (one block's with --checkpointing)"
    )


def refusal(
    config: Common | SparsifyConfig, calibrate: CalibrateConfig | None = None
) -> str | None:
    """Why the stage cannot run on this machine, in a line that names what to change; None when it
    may fit.

    `calibrate`: of the same job, where its calibration is not there yet.
    """
    device, wanted = resolve_device(config.device), needs(config, calibrate)
    there, free = device_memory(device), free_disk(config.run)
    if wanted.at_least > there:
        return (
            f"{wanted.stage} needs {wanted.at_least / 1e9:.1f} GB of memory or more on {device}, {there / 1e9:.1f} GB are "
            f"there: {_what_fits(config, calibrate, there)}"
        )
    if wanted.disk > free:
        return (
            f"{wanted.stage} writes {wanted.disk / 1e9:.1f} GB or more, {free / 1e9:.1f} GB are free at {config.run}: "
            "free space, or use a folder on another disk"
        )
    return None


def _what_fits(
    config: Common | SparsifyConfig, calibrate: CalibrateConfig | None, there: int
) -> str:
    """The change after which it may."""
    changes = ({"streamed": True}, {"dtype": "bfloat16"}, {"streamed": True, "dtype": "bfloat16"})
    for change in changes:
        if needs(replace(config, **change), calibrate).at_least <= there:
            return " and ".join(setting_advice(config, name) or FITTING[name] for name in change)
    return f"{last_advice(config)}, or use a device with more memory"
