"""What calibrate takes from tar shards: pairs, which need neither text encoder nor VAE, or pictures with
captions, which become a folder of pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from ..algorithms.saved_batches import SavedBatches
from ..architectures import Inputs
from ..data.noised_batches import noised_batch, spread_timesteps
from ..data.pairs import LATENTS, TENSORS, joined_captions, read_empty, read_pairs
from ..data.picture_files import unpack_pictures
from ..data.sampling import with_guidance
from ..data.shards import samples, shard_files
from ..models.weights import Weights
from ..settings.prune_settings import CalibrateConfig
from ..system.progress import Progress


def holds_pairs(pattern: str) -> bool:
    """Whether the first sample is a pair. Raises ValueError for a pattern that names no file, and for a
    first shard without samples."""
    paths = shard_files(pattern)
    first = next(samples(paths), None)
    if first is None:
        raise ValueError(f"--shards {pattern}: {paths[0]} is empty; give shards with samples")
    return TENSORS in first[1]


def unpacked(config: CalibrateConfig, saved: SavedBatches) -> Path:
    """A folder of the shards' pictures, as many as are wanted; it goes when the calibration is done."""
    folder = saved.folder / "pictures"
    unpack_pictures(samples(shard_files(config.shards)), folder, config.samples)
    return folder


def pair_batches(config: CalibrateConfig, weights: Weights, saved: SavedBatches) -> list[Inputs]:
    """Pairs, noised at timesteps over the whole schedule, as pictures are."""
    paths, architecture = shard_files(config.shards), weights.architecture
    pairs = read_pairs(paths, architecture, weights.config, config.samples)
    generator = torch.Generator().manual_seed(config.seed)
    empty = torch.rand(config.samples, generator=generator) < config.empty_captions
    nothing = read_empty(paths) if bool(empty.any()) else {}
    timesteps = spread_timesteps(config.samples, generator)

    def batch(chunk: torch.Tensor, noise_seed: int) -> Inputs:
        rows = [pairs[i % len(pairs)] for i in chunk.tolist()]
        captions = [nothing if none else row for none, row in zip(empty[chunk], rows, strict=True)]
        text = joined_captions(architecture, captions)
        text = with_guidance(architecture, weights.config, text, config.guidance)
        latents = torch.stack([row[LATENTS].float() for row in rows])
        return noised_batch(architecture, latents, timesteps[chunk], text, noise_seed)

    batches = []
    chunks = torch.arange(config.samples).split(config.batch)
    for number, chunk in enumerate(Progress(chunks, desc="calibrate", unit="batch")):
        noise_seed = int(torch.randint(2**62, (), generator=generator))
        batches.append(saved.done(number, partial(batch, chunk, noise_seed)))
    return batches
