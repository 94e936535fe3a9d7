"""FLUX.1 in the host: fused q, k, v maps; attention and MLP of a single block share two maps, and
run text and image as one sequence."""

from __future__ import annotations

from functools import partial

import comfy.ldm.flux.model as host_module
import torch
from torch import nn

from ...ppcl_engine.architectures import architecture_named
from ...ppcl_engine.architectures.projections import Nothing, padded
from ...ppcl_engine.models.layout import Place
from .base import HALF, BlockList, Cut, Host, Maps
from .blocks import FixedModulation, ProjectedText, Texts, run_part

STREAMS = {"ffn_image": "img", "ffn_text": "txt"}  # prefixes of a double block's attributes
STOCK_WIDTH = 24 * 128  # the only width that the host supports
PATCH = 2


class Flux1Host(Host):
    engine = architecture_named("flux1")
    stock = ("FluxInpaint", "Flux", "FluxSchnell")
    module, model = host_module, "Flux"
    lists = (
        BlockList(
            name="double_blocks",
            kind="DoubleStreamBlock",
            depth="num_layers",
            reads={"image": "img", "text": "txt"},
            gives=("image", "text"),
        ),
        BlockList(
            name="single_blocks",
            kind="SingleStreamBlock",
            depth="num_single_layers",
            reads={"joint": "x"},
            gives=("joint",),
        ),
    )
    # the intervals are those by which its author's LoRA loader maps FLUX.1-dev's blocks
    presets = {"Flex.1-alpha": (57, 46, "4-15")}
    mark = "vector_in.in_layer.weight"
    text_map = "txt_attn.qkv"
    viewed = (
        "img_mod",
        "img_mod.lin",
        "txt_mod",
        "txt_mod.lin",
        "txt_attn",
        "txt_attn.qkv",
        "linear1",
        "linear2",
    )
    replaced = {
        "ffn_image": ("img_mlp.",),
        "ffn_text": ("txt_mlp.",),
        "ffn_joint": (),
        "text": ("txt_mod.", "txt_mlp.", "txt_attn.proj."),
    }
    cuts = {
        ("ffn_image", "paper"): {"img_mod.lin": HALF},
        ("ffn_text", "paper"): {"txt_mod.lin": HALF},
        ("ffn_joint", "gated"): {
            "linear1": Cut(rows=((0, 1, 2), 7)),
            "linear2": Cut(columns=((0,), 5)),
        },
    }

    def is_stock(self, tensors) -> bool:
        """Without a final layer it is a ControlNet, which is built from a part of the model."""
        return (
            "final_layer.linear.weight" not in tensors
            or tensors["img_in.weight"].shape[0] == STOCK_WIDTH
        )

    def project_ffn(self, block: nn.Module, kind: str, form: str, projection: nn.Module) -> None:
        if kind == "ffn_joint":
            width = block.hidden_size
            block.linear1.forward = partial(_attention_and_input, block.linear1, width)
            block.mlp_hidden_dim_first, block.mlp_act = width, projection
            block.linear2.forward = partial(_attention_and_added, block.linear2, width)
            return
        short = STREAMS[kind]
        setattr(block, f"{short}_mlp", projection)
        if form == "paper":
            linear = getattr(block, f"{short}_mod").lin
            linear.forward = partial(_padded, linear, block.hidden_size)
            setattr(block, f"{short}_norm2", nn.Identity())

    def project_text(
        self, block: nn.Module, place: Place, maps: Maps, texts: Texts, source: nn.Module
    ) -> None:
        """The q, k, v map of the text stays."""
        fixed = FixedModulation(block.hidden_size, place.steps_text)
        block.txt_mod.lin = fixed
        block.txt_norm1 = ProjectedText(
            maps("text", "map"), texts, place.text_source, partial(modulated_text, source, fixed)
        )
        block.txt_norm2 = nn.Identity()
        block.txt_mlp = maps("text", "step") if place.steps_text else Nothing()
        block.txt_attn.proj = nn.Identity()

    def arguments(self, config) -> dict:
        channels = config["in_channels"]
        return {
            "in_channels": channels // PATCH**2,
            "out_channels": (config.get("out_channels") or channels) // PATCH**2,
            "vec_in_dim": config["pooled_projection_dim"],
            "context_in_dim": config["joint_attention_dim"],
            "hidden_size": self.engine.width(config),
            "mlp_ratio": 4.0,
            "num_heads": config["num_attention_heads"],
            "depth": config["num_layers"],
            "depth_single_blocks": config["num_single_layers"],
            "axes_dim": config["axes_dims_rope"],
            "theta": 10000,
            "patch_size": PATCH,
            "qkv_bias": True,
            "guidance_embed": config["guidance_embeds"],
        }

    def count_text_tokens(self, transformer: nn.Module, texts: Texts) -> None:
        """Counts the text as it leaves the double blocks, or as it came in, if another node runs in
        place of the last one."""
        transformer.txt_in.register_forward_hook(partial(_come_in, texts))
        transformer.double_blocks[-1].register_forward_hook(partial(_leave, texts))


def _come_in(texts: Texts, module: nn.Module, arguments, text: torch.Tensor) -> None:
    texts.tokens = text.shape[1]


def _leave(texts: Texts, module: nn.Module, arguments, streams: tuple[torch.Tensor, ...]) -> None:
    texts.tokens = streams[1].shape[1]


def modulated_text(block: nn.Module, fixed: FixedModulation, text: torch.Tensor) -> torch.Tensor:
    """What a double block's attention reads of the text; `fixed` knows silu(conditioning) [n, 1,
    d]."""
    shift, scale = block.txt_mod.lin(fixed.conditioning)[..., : 2 * text.shape[-1]].chunk(2, dim=-1)
    return torch.addcmul(shift, block.txt_norm1(text), 1 + scale)


def _padded(linear: nn.Module, width: int, activated: torch.Tensor) -> torch.Tensor:
    """A modulation of which only the attention's half is computed."""
    return padded(run_part(linear, activated, 3 * width, width))


def _attention_and_input(linear: nn.Module, width: int, x: torch.Tensor) -> torch.Tensor:
    """q, k, v and then x itself, in place of the MLP's first map: the projection stands where its
    activation was, and reads x."""
    return torch.cat([run_part(linear, x, 3 * width, width), x], dim=-1)


def _attention_and_added(linear: nn.Module, width: int, joined: torch.Tensor) -> torch.Tensor:
    """[attention, P(x)] -> W attention + b + P(x)"""
    attention, projected = joined.split(width, dim=-1)
    return run_part(linear, attention, width, width) + projected


HOST = Flux1Host()
