"""What `test_adapters.py` tries the host's nodes on: variants, blocks and a ControlNet for each
architecture."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import comfy.controlnet
import comfy.latent_formats
import comfy.ops
import torch
from comfy.cldm.dit_embedder import ControlNetEmbedder
from comfy.ldm.flux.controlnet import ControlNetFlux
from comfy.ldm.flux.model import FluxParams


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What the host's nodes are tried on, of one architecture."""

    depth: dict[str, list[str]]
    """variants without width -> their intervals"""
    width: tuple[str, ...]
    """other variants"""
    blocks: tuple[int, ...]
    """number of blocks in each of the host's lists"""
    guided: dict[str, str]
    """widgets of skip-layer guidance: the blocks that it leaves out"""
    control: Callable[[], comfy.controlnet.ControlNet]
    """makes the host's ControlNet of this architecture, small and random"""
    unnamed: str = "no such name"
    """part of the names of maps that a LoRA by diffusers' names is not tested with"""

    def slot(self, index: int) -> tuple[str, int]:
        """The key of a block in the host's `patches_replace`."""
        first = self.blocks[0]
        return ("double_block", index) if index < first else ("single_block", index - first)


def flux_control() -> comfy.controlnet.ControlNet:
    sizes = {
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 20,
        "context_in_dim": 24,
        "hidden_size": 32,
    }
    if "txt_ids_dims" in inspect.signature(FluxParams).parameters:
        sizes["txt_ids_dims"] = []
    network = ControlNetFlux(
        **sizes,
        latent_input=True,
        mlp_ratio=4.0,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[2, 6, 8],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        control_latent_channels=16,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    network.main_model_double, network.main_model_single = FLUX.blocks
    return comfy.controlnet.ControlNet(
        network,
        compression_ratio=1,
        latent_format=comfy.latent_formats.Flux(),
        load_device=torch.device("cpu"),
        extra_conds=["y", "guidance"],
    )


def sd35_control() -> comfy.controlnet.ControlNet:
    """As the released ones of the large model: it takes the pooled text's embedding from the model
    that it guides."""
    network = ControlNetEmbedder(
        img_size=None,
        patch_size=2,
        in_chans=16,
        attention_head_dim=64,
        num_attention_heads=2,
        adm_in_channels=20,
        num_layers=2,
        main_model_double=SD35.blocks[0],
        double_y_emb=True,
        device="cpu",
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    return comfy.controlnet.ControlNetSD35(
        network,
        compression_ratio=1,
        latent_format=comfy.latent_formats.SD3(),
        load_device=torch.device("cpu"),
    )


FLUX = Adapted(
    depth={"1-2": ["1-2"], "6-7": ["6-7"], "9-10": ["9-10"], "small": ["1-2", "6-7", "9-10"]},
    width=("full", "1-2,text:3-4", "6-7,ffn_joint:6", "smallest"),
    blocks=(5, 6),
    guided={"double_layers": "0, 4", "single_layers": "0, 3"},
    control=flux_control,
)
SD35 = Adapted(
    depth={"1-3": ["1-3"], "4-5": ["4-5"], "small": ["1-3", "4-5"]},
    width=("full", "1-3,text:4-5", "1-3,ffn_image:1", "smallest"),
    blocks=(8,),
    guided={"double_layers": "0, 6", "single_layers": ""},
    control=sd35_control,
    unnamed="norm1_context",  # the host takes the last block from the width: `test_sd35_layout.py`
)
ADAPTED = {"flux1": FLUX, "sd35": SD35}
