"""Captions encoded elsewhere: a safetensors file of `text` [n, tokens, width], `empty` and, where
the model reads them, `mask`, `pooled` and `empty_pooled`."""

from __future__ import annotations

from pathlib import Path

import torch

from ..architectures import Architecture
from ..system.finite import check_finite
from ..system.tensor_files import TensorFile
from . import flow
from .sampling import Prompts

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
    if not height or not width:
        raise ValueError(
            "stored embeddings do not say how large pictures are; give --height and --width"
        )
    file, text_name = TensorFile(path), architecture.caption_inputs[0]
    wanted = _wanted(file, architecture)
    _check_shapes(file, wanted, architecture.text_width(model_config))
    rows = torch.arange(len(empty_rows)) % file.shape("text")[0]
    positive = {name: file.read(stored)[rows] for stored, name in wanted.items() if name}
    negative = {text_name: file.read("empty")}
    if MASK in positive:
        positive[MASK] = positive[MASK].bool()
        if not bool(positive[MASK].any(dim=1).all()):
            raise ValueError(f"{path}: mask leaves a caption without a token; encode it again")
        tokens = max(t[text_name].shape[1] for t in (positive, negative))
        positive = {n: t if n == POOLED else _as_long(t, tokens) for n, t in positive.items()}
        negative[MASK] = torch.ones(negative[text_name].shape[:2], dtype=torch.bool)
    elif negative[text_name].shape[1:] != positive[text_name].shape[1:]:
        raise ValueError(
            f"{path}: this model does not mask text, so text and empty must have the same number of tokens"
        )
    negative |= {POOLED: file.read("empty_pooled")} if POOLED in positive else {}
    positive, negative = (
        {n: t if n == MASK else t.float() for n, t in text.items()} for text in (positive, negative)
    )
    for text in (positive, negative):
        check_finite(text, path, "encode the captions again")
    for name, tensor in negative.items():
        tokens = positive[name].shape[1]
        positive[name][empty_rows] = tensor if name == POOLED else _as_long(tensor, tokens)
    return Prompts(
        positive=positive,
        negative=negative,
        latent_shape=architecture.latent_shape(model_config, height, width),
        timesteps=lambda steps, image_tokens: flow.euler_timesteps(steps),
        rescales_guidance=False,
    )


def _wanted(file: TensorFile, architecture: Architecture) -> dict[str, str | None]:
    """Name in the file -> the model's name for it, where it reads it as it is. Raises ValueError
    naming the tensor that is missing."""
    text_name, *others = architecture.caption_inputs
    wanted: dict[str, str | None] = {"text": text_name, "empty": None}
    wanted |= {"mask": MASK} if MASK in others else {}
    wanted |= {"pooled": POOLED, "empty_pooled": None} if POOLED in others else {}
    if absent := [name for name in wanted if name not in file.entries]:
        raise ValueError(f"{file.path} has no tensor {absent[0]!r}; it needs {', '.join(wanted)}")
    return wanted


def _check_shapes(file: TensorFile, wanted: dict[str, str | None], width: int) -> None:
    """Raises ValueError naming the tensor, its shape and the one that the model reads."""
    shape = file.shape("text")
    count, tokens = (shape[0], shape[1]) if len(shape) == 3 else (0, 0)
    pooled = file.shape("pooled")[-1] if "pooled" in wanted and file.shape("pooled") else 0
    expected = {
        "text": (count, tokens, width),
        "empty": (1, file.shape("empty")[1] if len(file.shape("empty")) == 3 else 0, width),
        "mask": (count, tokens),
        "pooled": (count, pooled),
        "empty_pooled": (1, pooled),
    }
    for name in wanted:
        if file.shape(name) != expected[name] or 0 in expected[name]:
            said = {"text": "[captions, tokens, {}]", "empty": "[1, tokens, {}]"}.get(name, "{}")
            shown = said.format(width if "[" in said else list(expected[name]))
            raise ValueError(
                f"{file.path}: {name} is {list(file.shape(name))}, this model reads {shown}; encode the captions for it"
            )


def _as_long(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """[n, tokens, ...], padded with zeros; the mask hides the padding."""
    filled = tensor.new_zeros(len(tensor), tokens, *tensor.shape[2:])
    filled[:, : tensor.shape[1]] = tensor
    return filled
