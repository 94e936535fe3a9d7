"""Files given instead of a full model: recognised by names of tensors, and refused by what they
are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..architectures import ARCHITECTURES, Architecture
from ..system.json_text import shown

SHARD = re.compile(r".*-([0-9]{5})-of-([0-9]{5})\.(safetensors|bin)")
KINDS = (
    (
        (
            "controlnet_blocks.",
            "controlnet_x_embedder",
            "control_model.",
            "input_hint_block",
            "zero_convs.",
        ),
        "a ControlNet",
    ),
    ((".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lokr_w", ".hada_w"), "a LoRA"),
    (("ip_adapter.", "image_proj."), "an IP-Adapter"),
    (("distilled_guidance_layer.",), "Chroma"),
    (("noise_refiner.", "cap_embedder."), "Lumina"),
    (("input_blocks.", "down_blocks.", "output_blocks."), "a UNet (Stable Diffusion 1, 2 or XL)"),
    (("text_model.encoder.", "model.embed_tokens.", "encoder.block.0.layer."), "a text encoder"),
    (("decoder.conv_in.", "encoder.conv_in.", "decoder.conv1.", "encoder.downsamples."), "a VAE"),
    (("blocks.0.self_attn.", "blocks.0.cross_attn."), "Wan"),
)
"""parts of names -> what has them"""
FILE_KINDS = KINDS[:3]
"""the kinds that also have a model's names"""
READS = {
    6: "FLUX Fill (its input has a masked picture and a mask)",
    2: "FLUX Canny or Depth (its input has a control picture)",
}
"""channels in divided by channels out -> which model it is"""
KNOWN = "known: " + ", ".join(a.name for a in ARCHITECTURES)


def refuse_kinds(names: Collection[str], path: Path) -> None:
    """Raises ValueError for a file that has a model's names and more."""
    if kind := _kind_of(names, FILE_KINDS):
        raise ValueError(f"{path} is {kind}, not a full model; give the base model ({KNOWN})")


def unknown_model(names: Collection[str], path: Path) -> str:
    """One line for a file of no known architecture: what it looks like, or else its first keys."""
    if match := SHARD.fullmatch(path.name):
        return f"{path} is one shard of {int(match[2])} ({int(match[1])}); give the folder that they lie in"
    if kind := _kind_of(names, KINDS):
        return f"{path} is {kind}, which is of no known architecture ({KNOWN})"
    incomplete = [
        (len(missing), architecture.name, missing[0])
        for architecture in ARCHITECTURES
        for outer in _outer_names(architecture)
        if 2 * len(missing := sorted(outer - set(names))) < len(outer)
        and architecture.detect({*names, *outer})
    ]
    if incomplete:  # architectures share names: it is the one that lacks least
        count, name, first = min(incomplete)
        return (
            f"{path} looks like {name}, but lacks {count} tensors, first {first}; it is incomplete"
        )
    first = ", ".join(shown(name) for name in sorted(names)[:4]) or "none"
    return f"{path} is of no known architecture ({KNOWN}); its first keys: {first}"


def refuse_shard(path: Path, lacks: str) -> None:
    """Raises ValueError for one shard given as the whole model."""
    if match := SHARD.fullmatch(path.name):
        raise ValueError(
            f"{path} is one shard of {int(match[2])}, so it lacks {lacks}; give the folder that they lie in"
        )


def refuse_inputs(architecture: Architecture, config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for a model that reads more than the picture to draw."""
    reads, gives = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if architecture.name == "qwen_image":
        gives *= config.get("patch_size", 2) ** 2 if config.get("out_channels") else 1
    if reads != gives:
        which = (
            READS.get(reads // gives if reads % gives == 0 else 0)
            if architecture.name == "flux1"
            else None
        )
        said = f"is {which}" if which else "reads more than the picture that it draws"
        raise ValueError(
            f"{path} {said}: {reads} channels in, {gives} out; give the text-to-image or edit model"
        )


def _kind_of(names: Collection[str], kinds) -> str | None:
    return next(
        (kind for parts, kind in kinds if any(part in name for name in names for part in parts)),
        None,
    )


@cache
def _outer_names(architecture: Architecture) -> tuple[frozenset[str], frozenset[str]]:
    """By diffusers' and by ComfyUI's names; with those of block 0, some of which `detect` looks
    for."""
    config = architecture.tiny_config
    with torch.device("meta"):
        ours = list(architecture.build_outer(config).state_dict())
        for index in {0, config["num_layers"] if architecture.name == "flux1" else 0}:
            prefix = architecture.block_prefix(config, index)
            ours += [prefix + name for name in architecture.build_block(config, index).state_dict()]
    return frozenset(ours), frozenset(architecture.to_comfyui(name, ours).name for name in ours)
