"""Bench: time a forward of each variant, interleaved so that a busy machine slows all of them alike."""

from __future__ import annotations

import time

import torch

from ...algorithms.sparsity.kernels import on_kernels
from ...architectures.modules import AnyModule
from ...models.bundle import Bundle
from ...models.kinds import open_file
from ...models.opening import open_model
from ...models.weights import parameter_count
from ...settings.assess_settings import BenchConfig
from ...system.machine import DTYPES, resolve_device


def bench(config: BenchConfig) -> None:
    """Prints a table: parameters, median milliseconds, ratio to the first variant. 2:4 weights run on
    the GPU's kernels for them, if it has any."""
    device, dtype = resolve_device(config.device), DTYPES[config.dtype]
    found = open_file(config.path)
    names = found.variant_names if isinstance(found, Bundle) else [None]
    models = {
        name: open_model(config.path, name, config.base if name else None, dtype, device)
        for name in names
    }
    sparse = sum(map(on_kernels, models.values()))
    if sparse:
        print(f"{sparse} linear maps run on the GPU's 2:4 kernels")
    architecture = found.architecture
    first: AnyModule = next(iter(models.values()))
    model_config = dict(first.config)
    grid = (1, config.rows, config.columns)
    inputs = architecture.random_inputs(
        model_config, config.batch, grid, config.text_tokens, device
    )
    inputs = {
        k: v.to(dtype) if v.is_floating_point() and k != "timestep" else v
        for k, v in inputs.items()
    }
    seconds: dict = {name: [] for name in names}
    with torch.no_grad():
        for _ in range(config.repeats + 1):
            for name, model in models.items():
                seconds[name].append(
                    _timed(lambda model=model: architecture.call(model, inputs), device)
                )
    medians = {name: sorted(values[1:])[config.repeats // 2] for name, values in seconds.items()}
    first = next(iter(medians.values()))
    print(f"{'variant':12} {'parameters':>14} {'ms':>10} {'ratio':>7}")
    for name, model in models.items():
        print(
            f"{name or 'model':12} {parameter_count(model):>14,} {1e3 * medians[name]:>10.2f} {medians[name] / first:>7.3f}"
        )


def _timed(work, device: str) -> float:
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
