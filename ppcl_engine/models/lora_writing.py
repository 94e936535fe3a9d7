"""Names of a LoRA's tensors as loaders take them on a pruned model, and what cannot be adapted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from ..architectures import Architecture
from .comfyui_names import block_prefix_in_comfyui
from .layout import Layout, Place
from .lora_files import LoraFile
from .lora_kinds import LowRank

ADAPTED = "ppcl_adapted"
"""metadata of an adapted LoRA: for which plan and variant"""
COMFYUI = "diffusion_model."
DIFFUSERS = {"z_image": COMFYUI}
"""prefix before diffusers' names of modules that ComfyUI's stock loader takes; "transformer." for all
others"""


def adapted_tensors(
    architecture: Architecture,
    config: dict,
    place: Place,
    projections: Collection[str],
    pairs: Mapping[str, LowRank],
) -> dict[str, torch.Tensor]:
    """The pairs of a place, named by the teacher's number: `transformer.<module>.lora_A.weight` and
    `lora_B`, as PEFT and ComfyUI's stock loader take them.

    A projection has no name of the full model's. Its pair has two, since in a bundle's model the
    projections stand beside the teacher's block, and in a file of one variant inside it; a loader
    takes the one that is there.
    """
    prefix = architecture.block_prefix(config, place.index)
    own = {architecture.projection_names[kind]["map"]: kind for kind in projections}
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in pairs.items():
        modules = [f"{DIFFUSERS.get(architecture.name, 'transformer.')}{prefix}{name}"]
        if name in own:
            theirs = COMFYUI + block_prefix_in_comfyui(architecture, config, prefix)
            kind = own[name]
            modules = [
                f"{theirs}{architecture.comfyui_projections[kind]['map']}",
                f"{theirs}projections.{place.name}.{kind}.map",
            ]
        for module in modules:
            tensors[f"{module}.lora_A.weight"] = pair.down.contiguous().clone()
            tensors[f"{module}.lora_B.weight"] = (pair.scale * pair.up).contiguous()
    return tensors


def check_not_adapted(
    lora: LoraFile, by_block: Sequence[Collection[str]], layout: Layout, sections: Sequence[range]
) -> None:
    """Raises ValueError for a LoRA that was adapted before, or that counts the blocks of the pruned
    model: it changes exactly as many of the first blocks of each kind as the variant has."""
    if ADAPTED in lora.metadata:
        raise ValueError(f"{lora.path} is adapted already; give the LoRA that it was made from")
    places = [place.index for place in layout.places]
    touched = [index for index, names in enumerate(by_block) if names]
    counted = [
        index
        for section in sections
        for index in section[: sum(place in section for place in places)]
    ]
    if len(places) < layout.num_blocks and touched == counted:
        raise ValueError(
            f"{lora.path} changes blocks 0 to {len(places) - 1}, as many as the variant has: it is numbered for a "
            "pruned model, so load it on that model as it is"
        )
