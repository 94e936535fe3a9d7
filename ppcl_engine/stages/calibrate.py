"""Calibrate: record what blocks see in real use (method: paper, section 4.1).

Three sources: pictures with captions (noised at timesteps over the whole schedule), prompts alone
and stored embeddings (the teacher draws; states on its way are kept).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from .. import flow, sampling
from ..architectures import Architecture, Inputs
from ..bundle import assemble
from ..checkpoint import Weights
from ..codecs import open_codec
from ..config import CalibrateConfig
from ..data import CalibrationSet, caption_file, load_pictures, picture_files, save_calibration
from ..files import TensorFile, write_tensors
from ..layout import full_layout
from ..progress import Progress
from ..run import DTYPES, Run, resolve_device
from ..streaming import block_loader

MASK, POOLED = "encoder_hidden_states_mask", "pooled_projections"


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
    parts = _Parts(run.states / "calibrate", config, origin["fingerprint"])
    batches = _from_images(config, weights, parts) if config.images else _from_drawing(config, weights, parts)
    save_calibration(run.calibration, CalibrationSet(batches, origin))
    parts.remove()
    return run.calibration


class _Parts:
    """Batches that are done, a file each: drawing them takes hours on a large model."""

    def __init__(self, folder: Path, config: CalibrateConfig, fingerprint: str):
        self.folder = folder
        values = {f.name: str(getattr(config, f.name)) for f in fields(config) if f.name != "run"}
        self.settings = json.dumps({**values, "fingerprint": fingerprint})

    def done(self, number: int, make: Callable[[], Inputs]) -> Inputs:
        path = self.folder / f"batch_{number}.safetensors"
        if path.exists() and (file := TensorFile(path)).metadata["settings"] == self.settings:
            return file.read_all()
        inputs = make()
        write_tensors(path, inputs, {"settings": self.settings})
        return inputs

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def spread_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """One timestep in each of `count` equal parts of (0, 1), in random order: the whole schedule is covered."""
    parts = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return parts[torch.randperm(count, generator=generator)]


def _from_images(config: CalibrateConfig, weights: Weights, parts: _Parts) -> list[Inputs]:
    """All captions first, then all pictures: the text encoder and the VAE are never in memory together."""
    codec = open_codec(config.model, resolve_device(config.device))
    size = sampling.picture_size(codec, config.height, config.width)
    rows = picture_files(config.images)
    generator = torch.Generator().manual_seed(config.seed)
    empty = torch.rand(config.samples, generator=generator) < config.empty_captions
    timesteps = spread_timesteps(config.samples, generator)
    chunks = _chunks(config.samples, config.batch)
    captions = [caption for _, caption in rows]
    texts = [codec.text(_texts(captions, empty, chunk)) for chunk in Progress(chunks, desc="captions", unit="batch")]
    codec.release()
    batches = []
    for number, (chunk, text) in enumerate(zip(Progress(chunks, desc="calibrate", unit="batch"), texts, strict=True)):
        noise_seed = int(torch.randint(2**62, (), generator=generator))
        paths = [rows[i % len(rows)][0] for i in chunk.tolist()]

        def make(paths=paths, t=timesteps[chunk], text=text, noise_seed=noise_seed) -> Inputs:
            text = sampling.with_guidance(weights.architecture, weights.config, text, config.guidance)
            return _noised(weights.architecture, codec.latents(load_pictures(paths, size)), t, text, noise_seed)

        batches.append(parts.done(number, make))
    codec.release()
    return batches


def _noised(architecture: Architecture, latents: torch.Tensor, t: torch.Tensor, text, noise_seed: int) -> Inputs:
    clean = architecture.pack(latents)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(noise_seed))
    return sampling.inputs_of(flow.noised(clean, noise, t), t, text, architecture.grid(latents), clean)


def _from_drawing(config: CalibrateConfig, weights: Weights, parts: _Parts) -> list[Inputs]:
    """Text is encoded first and its encoder released, then the transformer comes."""
    device, architecture = resolve_device(config.device), weights.architecture
    generator = torch.Generator().manual_seed(config.seed)
    empty = torch.rand(config.samples, generator=generator) < config.empty_captions
    prompts = _stored_prompts(config, weights, empty) if config.embeddings else _encoded_prompts(config, empty, device)
    load = block_loader(weights, DTYPES[config.dtype], device, config.streamed)
    model = assemble(weights, None, full_layout(weights.num_blocks), DTYPES[config.dtype], device, load)
    kept_steps = torch.randint(config.steps, (config.samples,), generator=generator)
    batches = []
    for number, chunk in enumerate(Progress(_chunks(config.samples, config.batch), desc="calibrate", unit="batch")):
        noise = torch.randn(len(chunk), *prompts.latent_shape, generator=generator)
        given = (prompts.rows(chunk), noise, kept_steps[chunk])
        batches.append(parts.done(number, lambda given=given: _drawn(config, architecture, model, *given)))
    return batches


def _drawn(config, architecture, model, prompts, noise, kept_steps) -> Inputs:
    """Draws a batch; of each picture one state on its way is kept, and the end as the clean one."""
    grid, tokens = architecture.grid(noise), architecture.pack(noise)
    kept, times = torch.zeros_like(tokens), torch.zeros(len(tokens))

    def seen(step, x, t):
        rows = kept_steps == step
        kept[rows], times[rows] = x[rows], t

    clean = sampling.draw(architecture, model, tokens, grid, prompts, config.steps, config.guidance, seen)
    text = sampling.with_guidance(architecture, model.config, prompts.given, config.guidance)
    return sampling.inputs_of(kept, times, text, grid, clean)


def _encoded_prompts(config: CalibrateConfig, empty: torch.Tensor, device: str) -> sampling.Prompts:
    texts = _texts(caption_file(config.prompts), empty, torch.arange(config.samples))
    return sampling.encode_prompts(open_codec(config.model, device), texts, config.height, config.width)


def _stored_prompts(config: CalibrateConfig, weights: Weights, empty_rows: torch.Tensor) -> sampling.Prompts:
    """From a file of embeddings, to be drawn in equal steps: it brings no schedule.

    Raises ValueError naming the tensor that is missing or the size that is not given.
    """
    file, (text_name, *others) = TensorFile(config.embeddings), weights.architecture.caption_inputs
    wanted = {"text": text_name, "empty": None}
    wanted |= {"mask": MASK} if MASK in others else {}
    wanted |= {"pooled": POOLED, "empty_pooled": None} if POOLED in others else {}
    absent = [name for name in wanted if name not in file.entries]
    if absent:
        raise ValueError(f"{config.embeddings} has no tensor {absent[0]!r}; it needs {', '.join(wanted)}")
    if not config.height or not config.width:
        raise ValueError("stored embeddings do not say how large pictures are; give --height and --width")
    rows = torch.arange(config.samples) % file.shape("text")[0]
    given = {name: file.read(stored)[rows] for stored, name in wanted.items() if name}
    nothing = {text_name: file.read("empty")}
    if MASK in given:
        nothing[MASK] = torch.ones(nothing[text_name].shape[:2], dtype=torch.bool)
        given[MASK] = given[MASK].bool()
    elif nothing[text_name].shape[1:] != given[text_name].shape[1:]:
        raise ValueError(f"{config.embeddings}: this model masks no text, so text and empty need as many tokens")
    if POOLED in given:
        nothing[POOLED] = file.read("empty_pooled")
    given, nothing = ({n: t if n == MASK else t.float() for n, t in text.items()} for text in (given, nothing))
    for name, tensor in nothing.items():
        given[name][empty_rows] = _as_long(tensor, given[name])
    return sampling.Prompts(
        given=given,
        nothing=nothing,
        latent_shape=weights.architecture.latent_shape(weights.config, config.height, config.width),
        timesteps=lambda steps, image_tokens: flow.euler_timesteps(steps),
        rescales_guidance=False,
    )


def _as_long(empty: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[1, tokens, ...] filled up with zeros to the tokens of `like`: padding that its mask hides."""
    filled = torch.zeros_like(like[:1])
    filled[:, : empty.shape[1]] = empty
    return filled


def _texts(captions: list[str], empty: torch.Tensor, samples: torch.Tensor) -> list[str]:
    """The caption of each sample, in turn, or "" where `empty` [all samples] says so."""
    return ["" if empty[i] else captions[i % len(captions)] for i in samples.tolist()]


def _chunks(count: int, size: int) -> tuple[torch.Tensor, ...]:
    return torch.arange(count).split(size)
