"""Z-Image in the host, where it is Lumina 2's class with other sizes: fused q, k, v maps, and blocks
that run text and image as one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import comfy.ldm.lumina.model as host_module
import torch
from torch import nn

from ...ppcl_engine.architectures import architecture_named
from ...ppcl_engine.architectures.projections import opened
from ...ppcl_engine.models.layout import Place
from .base import HALF, BlockList, Host
from .blocks import Texts

STOCK_WIDTH = 30 * 128  # the only width at which the host takes a file for Z-Image
MODULATION = "adaLN_modulation"


class OpenGate(nn.Sequential):
    """The engine's; it takes the first half of a modulation that was not cut."""

    def __init__(self, width: int, *parts: nn.Module):
        super().__init__(*parts)
        self.width = width

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return opened(super().forward(conditioning)[..., : 2 * self.width])


class ZImageHost(Host):
    engine = architecture_named("z_image")
    stock = ("ZImage", "Lumina2")
    module, model = host_module, "NextDiT"
    lists = (
        BlockList(
            name="layers",
            kind="JointTransformerBlock",
            depth="n_layers",
            reads={"joint": "x"},
            gives=("joint",),
            settings="operation_settings",
        ),
    )
    told = ("axes_dims", "axes_lens")
    unread = ("norm_final",)  # up to 0.3.75 at least
    mark = "cap_pad_token"
    text_map = ""
    viewed = ()
    replaced = {"ffn_joint": ("feed_forward.", "ffn_norm2.")}
    cuts = {("ffn_joint", "paper"): {f"{MODULATION}.0": HALF}}

    def built_before(self, config: Mapping, blocks: BlockList) -> int:
        """The refiners, of the image and of the text."""
        return 2 * config["n_refiner_layers"]

    def vacated(self, place: Place) -> tuple[str, ...]:
        paper = any(site.form == "paper" for site in place.ffn)
        return (*super().vacated(place), *(("ffn_norm1.",) if paper else ()))

    def is_stock(self, tensors) -> bool:
        return tensors["x_embedder.weight"].shape[0] == STOCK_WIDTH

    def project_ffn(self, block: nn.Module, kind: str, form: str, projection: nn.Module) -> None:
        block.feed_forward, block.ffn_norm2 = projection, nn.Identity()
        if form == "paper":
            block.ffn_norm1 = nn.Identity()
            setattr(block, MODULATION, OpenGate(block.dim, *getattr(block, MODULATION)))

    def arguments(self, config) -> dict:
        names = (
            "in_channels",
            "dim",
            "n_layers",
            "n_refiner_layers",
            "n_heads",
            "n_kv_heads",
            "cap_feat_dim",
            "axes_dims",
            "axes_lens",
        )
        if sum(config["axes_dims"]) * config["n_heads"] != config["dim"]:
            raise ValueError(
                f"rotary axes {config['axes_dims']} of {config['n_heads']} heads do not add up to {config['dim']}; "
                "is the file complete?"
            )
        return {
            **{name: config[name] for name in names},
            "patch_size": 2,
            "multiple_of": 1,
            "ffn_dim_multiplier": 8 / 3,
            "qk_norm": True,
            "rope_theta": 256.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        }

    def count_text_tokens(self, transformer: nn.Module, texts: Texts) -> None:
        """Counts the text as it leaves its refiners."""
        transformer.context_refiner[-1].register_forward_hook(partial(_leave, texts))


def _leave(texts: Texts, module: nn.Module, arguments, text: torch.Tensor) -> None:
    texts.tokens = text.shape[1]


HOST = ZImageHost()
