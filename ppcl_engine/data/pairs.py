"""Pairs of a teacher: the latents of a picture that it drew, and what it reads of the caption, as one
safetensors file in a tar shard."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from ..architectures import Architecture, Inputs
from ..system.finite import check_finite
from ..system.tensor_files import TensorFile
from .codecs.pipeline import padded
from .shards import Sample, samples

LATENTS, TENSORS, CAPTION = "latents", "safetensors", "txt"
EMPTY = "empty.safetensors"
"""the empty caption, beside the shards"""


def caption_tensors(architecture: Architecture, text: Inputs, row: int) -> Inputs:
    """What is kept of a caption: one row, of a text with a mask without its padding."""
    name, *others = architecture.caption_inputs
    mask = next((text[other] for other in others if other.endswith("_mask")), None)
    kept = text[name][row] if mask is None else text[name][row][mask[row]]
    more = {n: text[n][row] for n in others if not n.endswith("_mask")}
    return {name: kept.contiguous(), **{n: t.contiguous() for n, t in more.items()}}


def joined_captions(architecture: Architecture, rows: Sequence[Inputs]) -> Inputs:
    """The inverse of `caption_tensors`: what a batch of captions gives the transformer."""
    name, *others = architecture.caption_inputs
    texts = [row[name].float() for row in rows]
    more = {
        n: torch.stack([row[n].float() for row in rows]) for n in others if not n.endswith("_mask")
    }
    if any(other.endswith("_mask") for other in others):
        return {**padded(texts), **more}
    return {name: torch.stack(texts), **more}


def pair_sample(latents: torch.Tensor, caption: Inputs, text: str) -> Sample:
    from safetensors.torch import save

    return {TENSORS: save({LATENTS: latents.contiguous(), **caption}), CAPTION: text.encode()}


def read_pairs(
    paths: Sequence[Path], architecture: Architecture, config: dict, most: int
) -> list[Inputs]:
    """The first `most` pairs of shards: latents [channels, rows, columns] and the caption's tensors.
    Raises ValueError naming the sample that is damaged, or is another model's."""
    pairs = [
        _pair(where, sample, architecture, config) for where, sample in islice(samples(paths), most)
    ]
    for pair in pairs[1:]:
        if pair[LATENTS].shape != pairs[0][LATENTS].shape:
            raise ValueError(
                f"{paths[0]} and the shards after it have latents of {list(pairs[0][LATENTS].shape)} and of "
                f"{list(pair[LATENTS].shape)}; give shards of one size"
            )
    return pairs


def _pair(where: str, sample: Sample, architecture: Architecture, config: dict) -> Inputs:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if TENSORS not in sample:
        raise ValueError(f"{where} has no .{TENSORS}, as the samples before it do")
    try:
        pair = load(sample[TENSORS])
    except SafetensorError as error:
        raise ValueError(f"{where}.{TENSORS} is damaged ({error}); write it again") from None
    _check(pair, where, architecture, config)
    return pair


def _check(pair: Inputs, where: str, architecture: Architecture, config: dict) -> None:
    name, *others = architecture.caption_inputs
    needed = {LATENTS: 3, name: 2, **{n: 1 for n in others if not n.endswith("_mask")}}
    for tensor, dimensions in needed.items():
        if tensor not in pair or pair[tensor].dim() != dimensions:
            raise ValueError(
                f"{where} has no {tensor} of {dimensions} dimensions; run ppcl data on this model"
            )
    width, channels = architecture.text_width(config), architecture.latent_shape(config, 0, 0)[0]
    found = pair[name].shape[1], pair[LATENTS].shape[0]
    if found != (width, channels):
        raise ValueError(
            f"{where} has a caption {found[0]} wide and latents of {found[1]} channels, this model reads "
            f"{width} and {channels}; run ppcl data on it"
        )
    check_finite(pair, where, "write the shard again")


def read_empty(paths: Sequence[Path]) -> Inputs:
    """What the teacher reads of an empty caption. Raises ValueError where it does not lie beside the
    shards."""
    path = paths[0].parent / EMPTY
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; copy it beside the shards, or use --empty-captions 0"
        )
    return TensorFile(path).read_all()
