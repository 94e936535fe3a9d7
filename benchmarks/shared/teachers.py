"""Teachers and calibration sets that benchmarks measure with: the demo's own, and random ones of
any size."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import torch

from ppcl_engine import demo
from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.data import flow, sampling
from ppcl_engine.data.calibration import CalibrationSet
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.codecs.table import TableCodec
from ppcl_engine.data.noised_batches import spread_timesteps
from ppcl_engine.data.rendered.captions import random_captions, render
from ppcl_engine.models.weights import Weights, expected_shapes
from ppcl_engine.plan import Interval
from ppcl_engine.system.tensor_files import TensorEntry, TensorFile, write_tensor_stream

BUNDLED = Path(demo.__file__).parent / "teacher.safetensors"
EMPTY_CAPTIONS = 0.1
WIDE = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "attention_head_dim": 128,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "axes_dims_rope": [16, 56, 56],
}
NARROW = {**WIDE, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": [2, 6, 8]}
INTERVAL, EVERY = 3, 5  # one interval of 3 blocks in every 5, so their number grows with depth
BATCHES, SAMPLES, GRID, TEXT_TOKENS = 3, 4, (1, 6, 6), 8


def describe(path: Path, weights: Weights) -> dict:
    """Where a result's teacher comes from; `step`: how long it was trained, where its file says
    so."""
    step = TensorFile(path).metadata.get("step")
    about = {
        "path": os.path.relpath(path),
        "fingerprint": weights.fingerprint,
        "blocks": weights.num_blocks,
    }
    return {**about, "step": step and int(step)}


def rendered(path: Path, weights: Weights, samples: int, batch: int, seed: int) -> CalibrationSet:
    """Pictures of the demo's task with captions, noised at timesteps that cover the whole
    schedule."""
    codec, generator = open_codec(path), torch.Generator().manual_seed(seed)
    captions = random_captions(samples, generator)
    empty = torch.rand(samples, generator=generator) < EMPTY_CAPTIONS
    text = codec.text(["" if e else c.text() for c, e in zip(captions, empty, strict=True)])
    latents = codec.latents(render(captions, generator))
    clean, t = weights.architecture.pack(latents), spread_timesteps(samples, generator)
    noisy = flow.noised(clean, torch.randn(clean.shape, generator=generator), t)
    grid = weights.architecture.grid(latents)
    chunks = torch.arange(samples).split(batch)
    rows = [{name: tensor[c] for name, tensor in text.items()} for c in chunks]
    batches = [
        sampling.inputs_of(noisy[c], t[c], row, grid, clean[c])
        for c, row in zip(chunks, rows, strict=True)
    ]
    return CalibrationSet(batches, origin(weights))


def origin(weights: Weights) -> dict:
    return {
        "architecture": weights.architecture.name,
        "fingerprint": weights.fingerprint,
        "source": "benchmark",
    }


def random_teacher(
    path: Path,
    config: dict,
    seed: int,
    codec: TableCodec | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A Qwen-Image file of random weights, written tensor by tensor: memory holds one at a time."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(QwenImage(), config)
    entries = [
        TensorEntry(name, dtype, shape, lambda n=name, s=shape: random_tensor(n, s, generator))
        for name, shape in shapes.items()
    ]
    metadata = {"config": json.dumps(config)}
    # then the transformer's keys need ComfyUI's prefix, as in the demo's teacher
    if codec is not None:
        entries = [
            TensorEntry(f"model.diffusion_model.{e.name}", e.dtype, e.shape, e.read)
            for e in entries
        ]
        entries += [
            TensorEntry(n, t.dtype, tuple(t.shape), lambda t=t: t)
            for n, t in codec.tensors().items()
        ]
        metadata |= codec.metadata()
    write_tensor_stream(path, entries, metadata)


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Matrices keep the scale of what they multiply; norms are near one, biases near zero."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) > 1:
        return values / shape[-1] ** 0.5
    return 0.02 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def peak_bytes() -> int:
    """The peak memory of this process since it began. ru_maxrss would carry over the parent's peak
    after a fork."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def intervals(depth: int) -> tuple[Interval, ...]:
    starts = range(1, depth - INTERVAL, EVERY)
    return tuple(Interval(first=first, last=first + INTERVAL - 1) for first in starts)
