"""What a stage would take on this machine, computed from the configuration alone, without weights and
without a trial run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..algorithms.distillation.rounds import REUSE
from ..models.cost import CostModel, largest_pair
from ..models.opening import model_config
from ..plan import Interval
from ..settings.base_settings import TuningConfig
from ..settings.convert_settings import JobConfig, SparsifyConfig
from ..settings.prune_settings import CalibrateConfig
from ..system.machine import DTYPES, device_memory, flops_a_second, free_disk, resolve_device
from ..system.numbers import bytes_text, count_text, duration_text, seconds_text
from .advice import STREAMED, last_advice, setting_advice
from .counts import ACTIVATIONS_PER_TOKEN, FP32, GRID, OPTIMISER_COPIES, TEXT_TOKENS, TUNING_COPIES
from .needs import needs

# advice for stages without their own
FITTING = {"streamed": STREAMED[-1], "dtype": "choose dtype bfloat16"}


@dataclass(frozen=True)
class Estimate:
    """What distilling depth takes with one way of holding the teacher."""

    name: str
    """resident or streamed"""
    device_bytes: int
    host_bytes: int
    """on a CPU the same; otherwise of the blocks that wait in the host's memory"""
    seconds_a_step: float
    fits: bool
    """whether the device has that much memory"""


def estimate(cost: CostModel, dtype: torch.dtype, device: str) -> list[Estimate]:
    """For a resident and for a streamed teacher, while the student of the largest block is trained."""
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


def print_estimate(config: JobConfig) -> None:
    """What `--dry-run` prints."""
    name, architecture, settings = model_config(config.model)
    device, dtype = resolve_device(config.device), DTYPES[config.dtype]
    blocks = architecture.num_blocks(settings)
    cost = CostModel(architecture, settings, GRID, TEXT_TOKENS)
    parameters = cost.outer_parameters + sum(block.parameters for block in cost.blocks())
    print(f"{name}: {architecture.name}, {blocks} blocks, {count_text(parameters)} parameters")
    print(
        f"on disk: {bytes_text(2 * parameters)} in bf16, {bytes_text(4 * parameters)} in fp32; "
        f"{bytes_text(free_disk(config.run))} are free"
    )
    if not isinstance(config, SparsifyConfig):  # sparsify trains nothing
        _print_distilling(estimate(cost, dtype, device), device, config.dtype)
    if isinstance(config, TuningConfig):
        print(_tuning_note(parameters))
    wanted = needs(config)
    print(
        f"{wanted.stage} with these settings and this run's samples: {bytes_text(wanted.memory)} of memory "
        f"({bytes_text(wanted.at_least)} for certain), {bytes_text(wanted.disk)} of new files, "
        f"{duration_text(wanted.seconds)}"
    )
    if line := refusal(config):
        print(f"as a job it would be refused: {line}")


def _print_distilling(rows: list[Estimate], device: str, dtype: str) -> None:
    print(f"distil depth on {device} in {dtype}, one sample of 1024 x 1024 an update:")
    print(f"{'':10} {'device':>10} {'host':>10} {'a step':>10}  fits")
    for row in rows:
        fits = "yes" if row.fits else f"no: {bytes_text(device_memory(device))} here"
        print(
            f"{row.name:10} {bytes_text(row.device_bytes):>10} {bytes_text(row.host_bytes):>10} "
            f"{seconds_text(row.seconds_a_step):>10}  {fits}"
        )


def _tuning_note(parameters: int) -> str:
    """On the memory of tuning: weights, gradient, two moments and average, all float32."""
    size = TUNING_COPIES * FP32
    return (
        f"tuning on the velocity takes more: {size} bytes a trained parameter, {bytes_text(parameters * size)} if "
        "that is the whole model, and what all blocks keep for their gradients (one block's with --checkpointing)"
    )


def refusal(config: JobConfig, calibrate: CalibrateConfig | None = None) -> str | None:
    """Why the stage cannot run on this machine, in a line that says what to change; None if it may fit.

    calibrate: settings of the same job's calibration, if that is still to be made.
    """
    device, wanted = resolve_device(config.device), needs(config, calibrate)
    there, free = device_memory(device), free_disk(config.run)
    if wanted.at_least > there:
        return (
            f"{wanted.stage} needs {bytes_text(wanted.at_least)} of memory or more on {device}, {bytes_text(there)} are "
            f"there: {_what_fits(config, calibrate, there)}"
        )
    if wanted.disk > free:
        return (
            f"{wanted.stage} writes {bytes_text(wanted.disk)} or more, {bytes_text(free)} are free at {config.run}: "
            "free space, or use a folder on another disk"
        )
    return None


def _what_fits(config: JobConfig, calibrate: CalibrateConfig | None, there: int) -> str:
    """What to change so that it may fit."""
    changes = ({"streamed": True}, {"dtype": "bfloat16"}, {"streamed": True, "dtype": "bfloat16"})
    for change in changes:
        if needs(replace(config, **change), calibrate).at_least <= there:
            return " and ".join(setting_advice(config, name) or FITTING[name] for name in change)
    return f"{last_advice(config)}, or use a device with more memory"
