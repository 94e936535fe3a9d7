"""Calibrate: record what blocks see in real use (method: paper, section 4.1).

Three sources: pictures with captions (noised at timesteps over the whole schedule), prompts alone
and stored embeddings (the teacher draws; states on its way are kept).
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from .. import flow, sampling
from ..architectures import Architecture, Inputs
from ..checkpoint import Weights, assemble
from ..codecs import Codec, open_codec
from ..config import CalibrateConfig
from ..data import CalibrationSet, caption_file, load_pictures, picture_files, save_calibration
from ..files import TensorFile
from ..plan import Variant
from ..run import DTYPES, Run, resolve_device


def calibrate(config: CalibrateConfig) -> Path:
    """Writes `calibration.safetensors`. Raises ValueError unless exactly one source is given."""
    sources = [s for s in (config.images, config.prompts, config.embeddings) if s is not None]
    if len(sources) != 1:
        raise ValueError("calibrate needs one source: --images, --prompts or --embeddings")
    run, weights = Run(config.run), Weights(config.model)
    origin = {
        "architecture": weights.architecture.name,
        "fingerprint": weights.fingerprint,
        "seed": config.seed,
        "source": "images" if config.images else "prompts" if config.prompts else "embeddings",
    }
    if config.images:
        batches = _from_images(config, weights.architecture)
    else:
        batches = _from_drawing(config, weights)
    save_calibration(run.calibration, CalibrationSet(batches, origin))
    return run.calibration


def spread_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """One timestep in each of `count` equal parts of (0, 1), in random order: the whole schedule is covered."""
    parts = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return parts[torch.randperm(count, generator=generator)]


def _from_images(config: CalibrateConfig, architecture: Architecture) -> list[Inputs]:
    codec = open_codec(config.model, resolve_device(config.device))
    rows = picture_files(config.images)
    size = (config.height or codec.picture_size[0], config.width or codec.picture_size[1])
    generator = torch.Generator().manual_seed(config.seed)
    empty = torch.rand(config.samples, generator=generator) < config.empty_captions
    timesteps = spread_timesteps(config.samples, generator)
    batches = []
    for chunk in tqdm(_chunks(config.samples, config.batch), desc="calibrate", unit="batch"):
        chosen = [rows[i % len(rows)] for i in chunk.tolist()]
        texts = ["" if empty[i] else caption for i, (_, caption) in zip(chunk.tolist(), chosen, strict=True)]
        latents = codec.latents(load_pictures([path for path, _ in chosen], size)).float().cpu()
        clean, t = architecture.pack(latents), timesteps[chunk]
        noise = torch.randn(clean.shape, generator=generator)
        text, mask = codec.text(texts)
        batches.append(sampling.inputs_of(flow.noised(clean, noise, t), t, text, mask, architecture.grid(latents), clean))
    codec.release()
    return batches


def _from_drawing(config: CalibrateConfig, weights: Weights) -> list[Inputs]:
    """Text is encoded first and its encoder released, then the transformer comes."""
    device, architecture = resolve_device(config.device), weights.architecture
    generator = torch.Generator().manual_seed(config.seed)
    text, mask, empty_text, empty_mask, shape = _texts(config, architecture, weights, generator, device)
    model = assemble(weights, None, Variant(name="full"), DTYPES[config.dtype], device)
    latents = torch.zeros(1, *shape)
    grid = architecture.grid(latents)
    kept_steps = torch.randint(config.steps, (config.samples,), generator=generator)
    batches = []
    for chunk in tqdm(_chunks(config.samples, config.batch), desc="calibrate", unit="batch"):
        noise = architecture.pack(torch.randn(len(chunk), *shape, generator=generator))
        kept = torch.zeros_like(noise)
        times = torch.zeros(len(chunk))

        def seen(x, t, kept=kept, times=times, chunk=chunk):
            rows = kept_steps[chunk] == round((1 - t) * config.steps)
            kept[rows], times[rows] = x[rows], t

        given = (text[chunk], mask[chunk])
        nothing = (empty_text.expand(len(chunk), -1, -1), empty_mask.expand(len(chunk), -1))
        clean = sampling.draw(architecture, model, noise, grid, given, nothing, config.steps, config.guidance, seen)
        batches.append(sampling.inputs_of(kept, times, *given, grid, clean))
    return batches


def _texts(config, architecture, weights, generator, device):
    """(text, mask) of every sample, some empty; the empty caption's; the latents' shape."""
    empty_rows = torch.rand(config.samples, generator=generator) < config.empty_captions
    if config.embeddings:
        file = TensorFile(config.embeddings)
        absent = [name for name in ("text", "mask", "empty") if name not in file.entries]
        if absent:
            raise ValueError(f"{config.embeddings} has no tensor {absent[0]!r}; it needs text, mask and empty")
        text, mask, empty = file.read("text"), file.read("mask").bool(), file.read("empty")
        rows = torch.arange(config.samples) % len(text)
        text, mask = text[rows].clone(), mask[rows].clone()
        text[empty_rows, : empty.shape[1]], mask[empty_rows] = empty[0], False
        mask[empty_rows, : empty.shape[1]] = True
        empty_mask = torch.ones(empty.shape[:2], dtype=torch.bool)
        channels = weights.config["in_channels"] // 4
        return text, mask, empty, empty_mask, (channels, *_rows_columns(config, (1024, 1024), 8))
    codec: Codec = open_codec(config.model, device)
    prompts = caption_file(config.prompts)
    texts = ["" if empty_rows[i] else prompts[i % len(prompts)] for i in range(config.samples)]
    text, mask = codec.text(texts)
    empty, empty_mask = codec.text([""])
    shape = (codec.latent_channels, *_rows_columns(config, codec.picture_size, codec.pixels_per_latent))
    codec.release()
    return text.cpu(), mask.cpu(), empty.cpu(), empty_mask.cpu(), shape


def _rows_columns(config: CalibrateConfig, default: tuple[int, int], pixels: int) -> tuple[int, int]:
    height, width = config.height or default[0], config.width or default[1]
    if height % (2 * pixels) or width % (2 * pixels):
        raise ValueError(f"{height} x {width} pixels is not a multiple of {2 * pixels}; change --height, --width")
    return height // pixels, width // pixels


def _chunks(count: int, size: int) -> tuple[torch.Tensor, ...]:
    return torch.arange(count).split(size)
