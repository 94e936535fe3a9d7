"""What a stage would take on this machine, from the configuration alone: no weights, no trial run."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .architectures import ARCHITECTURES, Architecture
from .config import Common, TuningConfig
from .cost import CostModel
from .files import read_json
from .plan import Interval
from .run import DTYPES, resolve_device

GRID, TEXT_TOKENS = (1, 64, 64), 128  # 1024 x 1024 pixels
ACTIVATIONS_PER_TOKEN = 40  # values of one width that a block's backward keeps, counted on diffusers' block
TUNING_COPIES = 5
OPTIMISER_COPIES = 4  # weights, gradients, two moments


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of distilling depth with this many samples an update."""

    name: str
    device_bytes: int
    host_bytes: int
    seconds_a_step: float
    fits: bool


def model_config(model: Path) -> tuple[str, Architecture, dict]:
    """(name, architecture, configuration) of a known model's name, a folder with a config.json, or a model file."""
    for architecture in ARCHITECTURES:
        if str(model) in architecture.model_configs:
            return str(model), architecture, architecture.model_configs[str(model)]
    for folder in (model / "transformer", model):
        if (folder / "config.json").exists():
            return _from_config_file(model, read_json(folder / "config.json"))
    if model.is_file():
        from .checkpoint import Weights

        weights = Weights(model)
        return model.name, weights.architecture, weights.config
    known = ", ".join(name for a in ARCHITECTURES for name in a.model_configs)
    raise ValueError(f"--model {model}: no such file, no folder with a config.json, and not one of {known}")


def _from_config_file(model: Path, values: dict) -> tuple[str, Architecture, dict]:
    for architecture in ARCHITECTURES:
        if values.get("_class_name") == architecture.diffusers_class:
            return model.name, architecture, {k: v for k, v in values.items() if not k.startswith("_")}
    known = ", ".join(a.diffusers_class for a in ARCHITECTURES)
    raise ValueError(f"{model}: class {values.get('_class_name')!r} is unknown; known: {known}")


def estimate(architecture: Architecture, config: dict, dtype: torch.dtype, device: str) -> list[Estimate]:
    """Resident and streamed, with one student in training."""
    cost = CostModel(architecture, config, GRID, TEXT_TOKENS)
    blocks, size = architecture.num_blocks(config), dtype.itemsize
    block = cost.block(0)
    student = cost.student(Interval(first=0, last=1, correction="affine"))
    tokens = math.prod(GRID) + TEXT_TOKENS
    activations = tokens * architecture.width(config) * ACTIVATIONS_PER_TOKEN * size
    training = OPTIMISER_COPIES * student.parameters * size + activations
    outer = cost.outer_parameters * size
    speed = _flops_a_second(device, dtype)
    seconds = (3 * student.flops + block.flops * blocks / 4) / speed  # a sweep feeds four updates
    rows = []
    for name, resident_blocks in (("resident", blocks), ("streamed", 2)):
        needed = outer + resident_blocks * block.parameters * size + training
        host = needed if device == "cpu" else 2 * block.parameters * size
        rows.append(Estimate(name, needed, host, seconds, needed <= _memory(device)))
    return rows


def print_estimate(config: Common) -> None:
    name, architecture, settings = model_config(config.model)
    device, dtype = resolve_device(config.device), DTYPES[config.dtype]
    blocks = architecture.num_blocks(settings)
    cost = CostModel(architecture, settings, GRID, TEXT_TOKENS)
    parameters = cost.outer_parameters + sum(cost.block(i).parameters for i in range(blocks))
    print(f"{name}: {architecture.name}, {blocks} blocks, {parameters / 1e9:.2f} B parameters")
    free = _free_disk(config.run) / 1e9
    print(
        f"on disk: {parameters * 2 / 1e9:.1f} GB in bf16, {parameters * 4 / 1e9:.1f} GB in fp32; {free:.0f} GB are free"
    )
    print(f"distil depth on {device} in {config.dtype}, one sample of 1024 x 1024 an update:")
    print(f"{'':10} {'device GB':>10} {'host GB':>10} {'s a step':>10}  fits")
    for row in estimate(architecture, settings, dtype, device):
        fits = "yes" if row.fits else f"no: {_memory(device) / 1e9:.0f} GB here"
        print(
            f"{row.name:10} {row.device_bytes / 1e9:>10.1f} {row.host_bytes / 1e9:>10.1f} {row.seconds_a_step:>10.1f}  {fits}"
        )
    if isinstance(config, TuningConfig):
        print(_tuning_note(parameters))


def _tuning_note(parameters: int) -> str:
    """Weights, gradient, two moments and average, all float32."""
    size = TUNING_COPIES * torch.float32.itemsize
    return (
        f"tuning on the velocity takes more: {size} bytes a trained parameter, {parameters * size / 1e9:.0f} GB if "
        "that is the whole model, and what all blocks keep for their gradients (one block's with --checkpointing)"
    )


def _flops_a_second(device: str, dtype: torch.dtype) -> float:
    """Of one large matrix product, measured; real blocks reach about this on large inputs."""
    size = 1536 if device == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    a @ a
    start, count = time.perf_counter(), 3
    for _ in range(count):
        b = a @ a
    float(b[0, 0])
    return count * 2 * size**3 / (time.perf_counter() - start)


def _memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_disk(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
