"""Teachers and calibration sets that benchmarks measure with: the demo's own, and random ones of any size."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ppcl_engine import demo, flow, sampling
from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.checkpoint import Weights, expected_shapes
from ppcl_engine.codecs import TableCodec, open_codec
from ppcl_engine.data import CalibrationSet
from ppcl_engine.demo.task import random_captions, render
from ppcl_engine.files import TensorEntry, TensorFile, write_tensor_stream
from ppcl_engine.stages.calibrate import spread_timesteps

BUNDLED = Path(demo.__file__).parent / "teacher.safetensors"
EMPTY_CAPTIONS = 0.1


def describe(path: Path, weights: Weights) -> dict:
    """Where a result's teacher comes from; `step`: how long it was trained, where its file says so."""
    step = TensorFile(path).metadata.get("step")
    about = {"path": os.path.relpath(path), "fingerprint": weights.fingerprint, "blocks": weights.num_blocks}
    return {**about, "step": step and int(step)}


def rendered(path: Path, weights: Weights, samples: int, batch: int, seed: int) -> CalibrationSet:
    """Pictures of the demo's task with captions, noised at timesteps that cover the whole schedule."""
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
    batches = [sampling.inputs_of(noisy[c], t[c], row, grid, clean[c]) for c, row in zip(chunks, rows, strict=True)]
    return CalibrationSet(batches, origin(weights))


def origin(weights: Weights) -> dict:
    return {"architecture": weights.architecture.name, "fingerprint": weights.fingerprint, "source": "benchmark"}


def random_teacher(
    path: Path, config: dict, seed: int, codec: TableCodec | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """A Qwen-Image file of random weights, written tensor by tensor: memory holds one at a time."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(QwenImage(), config)
    entries = [
        TensorEntry(name, dtype, shape, lambda n=name, s=shape: _random_tensor(n, s, generator))
        for name, shape in shapes.items()
    ]
    metadata = {"config": json.dumps(config)}
    if codec is not None:  # then the transformer's keys need ComfyUI's prefix, as in the demo's teacher
        entries = [TensorEntry(f"model.diffusion_model.{e.name}", e.dtype, e.shape, e.read) for e in entries]
        entries += [TensorEntry(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in codec.tensors().items()]
        metadata |= codec.metadata()
    write_tensor_stream(path, entries, metadata)


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Matrices keep the scale of what they multiply; norms are near one, biases near zero."""
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values / shape[-1] ** 0.5
    return 0.02 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
