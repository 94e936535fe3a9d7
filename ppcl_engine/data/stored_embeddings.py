"""Captions encoded elsewhere: a safetensors file of `text` [n, tokens, width], `empty` and, where
the model reads them, `mask`, `pooled` and `empty_pooled`."""

from __future__ import annotations

from pathlib import Path

import torch

from ..architectures import Architecture
from ..system.finite import check_finite
from ..system.tensor_files import TensorFile
from . import flow
from .draw import Prompts

MASK, POOLED = "encoder_hidden_states_mask", "pooled_projections"


def stored_prompts(
    path: Path,
    architecture: Architecture,
    model_config: dict,
    empty_rows: torch.Tensor,
    height: int,
    width: int,
) -> Prompts:
    """Prompts from a file of embeddings, drawn in equal steps, since the file has no schedule.

    `empty_rows`: bool [samples], the samples that get no caption; the others get the file's
    captions in turn. Raises ValueError naming the tensor that is missing, or a size that is not
    given.
    """
    file, (text_name, *others) = TensorFile(path), architecture.caption_inputs
    wanted = {"text": text_name, "empty": None}
    wanted |= {"mask": MASK} if MASK in others else {}
    wanted |= {"pooled": POOLED, "empty_pooled": None} if POOLED in others else {}
    absent = [name for name in wanted if name not in file.entries]
    if absent:
        raise ValueError(f"{path} has no tensor {absent[0]!r}; it needs {', '.join(wanted)}")
    if not height or not width:
        raise ValueError(
            "stored embeddings do not say how large pictures are; give --height and --width"
        )
    rows = torch.arange(len(empty_rows)) % file.shape("text")[0]
    positive = {name: file.read(stored)[rows] for stored, name in wanted.items() if name}
    negative = {text_name: file.read("empty")}
    if MASK in positive:
        negative[MASK] = torch.ones(negative[text_name].shape[:2], dtype=torch.bool)
        positive[MASK] = positive[MASK].bool()
    elif negative[text_name].shape[1:] != positive[text_name].shape[1:]:
        raise ValueError(
            f"{path}: this model masks no text, so text and empty must have the same number of tokens"
        )
    if POOLED in positive:
        negative[POOLED] = file.read("empty_pooled")
    positive, negative = (
        {n: t if n == MASK else t.float() for n, t in text.items()} for text in (positive, negative)
    )
    for text in (positive, negative):
        check_finite(text, path, "encode the captions again")
    for name, tensor in negative.items():
        positive[name][empty_rows] = _as_long(tensor, positive[name])
    return Prompts(
        positive=positive,
        negative=negative,
        latent_shape=architecture.latent_shape(model_config, height, width),
        timesteps=lambda steps, image_tokens: flow.euler_timesteps(steps),
        rescales_guidance=False,
    )


def _as_long(empty: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[1, tokens, ...] padded with zeros to the tokens of `like`; its mask hides the padding."""
    filled = torch.zeros_like(like[:1])
    filled[:, : empty.shape[1]] = empty
    return filled
