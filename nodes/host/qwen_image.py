"""Qwen-Image in the host, which uses diffusers' names for it."""

from __future__ import annotations

import inspect
from functools import partial

import comfy.ldm.qwen_image.model as host_module
import torch
from torch import nn

from ...ppcl_engine.architectures import architecture_named, projections
from ...ppcl_engine.models.layout import Place
from .base import HALF, BlockList, Host, Maps
from .blocks import FixedModulation, ProjectedText, Texts

STOCK_WIDTH = 24 * 128  # the only width that the host supports
STREAMS = {"ffn_image": "img", "ffn_text": "txt"}  # prefixes of a block's attributes
# ways to position references: behind the picture by index, the second also modulated as at t = 0
INDEX, AT_ZERO = "index", "index_timestep_zero"
METHOD = "default_ref_method"  # argument and attribute of the host's class, if it knows AT_ZERO
OFFSETS = ("offset", "uxo")  # each reference beside the one before: a single one stands as by INDEX


class PaddedModulation(nn.Sequential):
    """The engine's; it takes the first half of a modulation that was not cut."""

    def __init__(self, width: int, *parts: nn.Module):
        super().__init__(*parts)
        self.width = width

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return projections.padded(super().forward(conditioning)[..., : 3 * self.width])


class QwenImageHost(Host):
    engine = architecture_named("qwen_image")
    stock = ("QwenImage",)
    module, model = host_module, "QwenImageTransformer2DModel"
    lists = (
        BlockList(
            name="transformer_blocks",
            kind="QwenImageTransformerBlock",
            depth="num_layers",
            reads={"image": "hidden_states", "text": "encoder_hidden_states"},
            gives=("text", "image"),
        ),
    )
    mark = "txt_norm.weight"
    text_map = "attn.add_q_proj"
    final = "norm_out"
    viewed = ("attn", "attn.add_q_proj")
    replaced = engine.replaced_names
    cuts = {("ffn_image", "paper"): {"img_mod.1": HALF}, ("ffn_text", "paper"): {"txt_mod.1": HALF}}

    def is_stock(self, tensors) -> bool:
        return tensors["img_in.weight"].shape[0] == STOCK_WIDTH

    def project_ffn(self, block: nn.Module, kind: str, form: str, projection: nn.Module) -> None:
        short = STREAMS[kind]
        setattr(block, f"{short}_mlp", projection)
        if form == "paper":
            setattr(
                block, f"{short}_mod", PaddedModulation(block.dim, *getattr(block, f"{short}_mod"))
            )
            setattr(block, f"{short}_norm2", nn.Identity())

    def project_text(
        self, block: nn.Module, place: Place, maps: Maps, texts: Texts, source: nn.Module
    ) -> None:
        """The q, k, v maps of the text stay."""
        fixed = FixedModulation(block.attn.add_q_proj.in_features, place.steps_text)
        block.txt_mod = fixed
        block.txt_norm1 = ProjectedText(
            maps("text", "map"), texts, place.text_source, partial(modulated_text, source, fixed)
        )
        block.txt_norm2 = nn.Identity()
        block.txt_mlp = maps("text", "step") if place.steps_text else projections.Nothing()
        block.attn.to_add_out = nn.Identity()

    def check_references(
        self, transformer: nn.Module, config, method: str | None, pictures: int
    ) -> None:
        own = getattr(transformer, METHOD, None)
        used, wanted = method or own or INDEX, AT_ZERO if config.get("zero_cond_t") else INDEX
        if used in OFFSETS and pictures == 1:
            used = INDEX
        if used == wanted == AT_ZERO and own is None:
            used = f"{AT_ZERO}, which this version does not know"
        if used != wanted:
            raise ValueError(
                f"ComfyUI reads the reference pictures by the method {used}, this model reads them by {wanted}; take out "
                "the node that chooses the method, or update ComfyUI"
            )

    def arguments(self, config) -> dict:
        names = (
            "patch_size",
            "in_channels",
            "out_channels",
            "num_layers",
            "attention_head_dim",
            "num_attention_heads",
            "joint_attention_dim",
            "axes_dims_rope",
        )
        arguments = {name: config[name] for name in names}
        known = inspect.signature(host_module.QwenImageTransformer2DModel).parameters
        if config.get("zero_cond_t") and METHOD in known:
            arguments[METHOD] = AT_ZERO
        return arguments

    def time_embedder(self, width: int, **options) -> nn.Module:
        return host_module.QwenTimestepProjEmbeddings(width, 768, **options)


def modulated_text(block: nn.Module, fixed: FixedModulation, text: torch.Tensor) -> torch.Tensor:
    """What a block's joint attention reads of the text; `fixed` knows the conditioning."""
    shift, scale = block.txt_mod(fixed.conditioning).split(text.shape[-1], dim=-1)[:2]
    return torch.addcmul(shift.unsqueeze(1), block.txt_norm1(text), 1 + scale.unsqueeze(1))


HOST = QwenImageHost()
