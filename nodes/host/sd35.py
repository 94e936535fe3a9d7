"""SD3.5 in the host: joint blocks of two halves with fused q, k, v maps. The last block returns no
text; some blocks attend to the image twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import comfy.ldm.modules.diffusionmodules.mmdit as host_module
import torch
from torch import nn

from ...ppcl_engine.architectures import architecture_named
from ...ppcl_engine.architectures.projections import Nothing, padded
from ...ppcl_engine.models.layout import Place
from ...ppcl_engine.plan import WidthSite
from .base import HALF, BlockList, Cut, Host, Maps
from .blocks import FixedModulation, ProjectedText, Texts

HALVES = {"ffn_image": "x_block", "ffn_text": "context_block"}
MODULATION = "adaLN_modulation"
HEAD = 64  # the only size the host supports; by itself it assumes as many blocks as heads
OUTER_THIRDS = Cut(rows=((0, 2), 3))
"""what the paper's form of an FFN projection leaves of a modulation in a block that attends twice:
the FFN's third is the middle one"""


class PaddedModulation(nn.Sequential):
    """A modulation whose FFN entries are shift 0, scale 0 and gate 1, whether or not it was cut."""

    def __init__(self, width: int, dual: bool, *parts: nn.Module):
        super().__init__(*parts)
        self.width, self.dual = width, dual

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        modulation, third = super().forward(conditioning), 3 * self.width
        first = padded(modulation[..., :third])
        return torch.cat([first, modulation[..., -third:]], dim=-1) if self.dual else first


class FixedShiftAndScale(FixedModulation):
    """For the last block, which only modulates its text."""

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return super().forward(conditioning)[..., : 2 * self.width]


class SD35Host(Host):
    engine = architecture_named("sd35")
    stock = ("SD3",)
    module, model = host_module, "OpenAISignatureMMDITWrapper"
    lists = (
        BlockList(
            name="joint_blocks",
            kind="JointBlock",
            depth="num_layers",
            reads={"text": "context", "image": "x"},
            gives=("text", "image"),
        ),
    )
    told = ("dual_attention_layers",)
    # ControlNets, which are built from a part of the model, have none
    mark = "final_layer.linear.weight"
    text_map = "context_block.attn.qkv"
    viewed = ("x_block", "context_block", "context_block.attn", "context_block.attn.qkv")
    replaced = {
        "ffn_image": ("x_block.mlp.",),
        "ffn_text": ("context_block.mlp.",),
        "text": (f"context_block.{MODULATION}.", "context_block.mlp.", "context_block.attn.proj."),
    }

    def cuts_at(self, config: Mapping, site: WidthSite) -> dict[str, Cut]:
        if site.form != "paper" or site.kind not in HALVES:
            return {}
        dual = site.kind == "ffn_image" and site.block in _dual(config)
        return {f"{HALVES[site.kind]}.{MODULATION}.1": OUTER_THIRDS if dual else HALF}

    def is_stock(self, tensors) -> bool:
        heads, blocks = self._counted(tensors)
        return blocks == heads or not self.engine.detect(tensors)

    def check_told(self, tensors) -> None:
        """The host may have converted diffusers' names. It then took the wrong block for the last
        one, whose text modulation differs from that of the others."""
        heads, blocks = self._counted(tensors)
        if blocks != heads:
            raise ValueError(
                f"the file has {blocks} blocks, but a full model of its width has {heads}; load it with Load Pruned Model (PPCL)"
            )

    def _counted(self, tensors) -> tuple[int, int]:
        """(heads, which is the number of blocks of a full model of this width; blocks in the file)"""
        numbers = {match[2] for match in map(self.block_name.match, tensors) if match}
        return tensors["x_embedder.proj.weight"].shape[0] // HEAD, len(numbers)

    def project_ffn(self, block: nn.Module, kind: str, form: str, projection: nn.Module) -> None:
        half = getattr(block, HALVES[kind])
        half.mlp = projection
        if form == "paper":
            width = half.attn.qkv.in_features
            setattr(
                half,
                MODULATION,
                PaddedModulation(width, half.x_block_self_attn, *getattr(half, MODULATION)),
            )
            half.norm2 = nn.Identity()

    def project_text(
        self, block: nn.Module, place: Place, maps: Maps, texts: Texts, source: nn.Module
    ) -> None:
        """The q, k, v map of the text stays."""
        half = block.context_block
        kind = FixedShiftAndScale if half.pre_only else FixedModulation
        fixed = kind(half.attn.qkv.in_features, place.steps_text)
        setattr(half, MODULATION, fixed)
        half.norm1 = ProjectedText(
            maps("text", "map"), texts, place.text_source, partial(modulated_text, source, fixed)
        )
        if not half.pre_only:
            half.norm2 = nn.Identity()
            half.mlp = maps("text", "step") if place.steps_text else Nothing()
            half.attn.proj = nn.Identity()

    def spread(self, config: Mapping, indices: Sequence[int], blocks: int) -> dict:
        dual = [indices[number] for number in _dual(config)]
        return {**super().spread(config, indices, blocks), "dual_attention_layers": dual}

    def arguments(self, config) -> dict:
        if config["attention_head_dim"] != HEAD:
            raise ValueError(
                f"ComfyUI runs {self.engine.name} with heads of {HEAD} only, but this model has heads of {config['attention_head_dim']}"
            )
        width, positions = self.engine.width(config), config["pos_embed_max_size"]
        context = {"in_features": config["joint_attention_dim"], "out_features": width}
        return {
            "input_size": None,
            "patch_size": config["patch_size"],
            "in_channels": config["in_channels"],
            "out_channels": config["out_channels"],
            "depth": width // HEAD,
            "num_blocks": config["num_layers"],
            "adm_in_channels": config["pooled_projection_dim"],
            "context_embedder_config": {"target": "torch.nn.Linear", "params": context},
            "num_patches": positions**2,
            "pos_embed_max_size": positions,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
            "x_block_self_attn_layers": _dual(config),
        }


def _dual(config: Mapping) -> list[int]:
    """Indices of the blocks that attend to the image twice."""
    blocks = config.get("dual_attention_layers")
    return list(blocks) if isinstance(blocks, list | tuple) else []


def modulated_text(block: nn.Module, fixed: FixedModulation, text: torch.Tensor) -> torch.Tensor:
    """What a block's joint attention reads of the text; `fixed` knows the conditioning."""
    half = block.context_block
    shift, scale = getattr(half, MODULATION)(fixed.conditioning).split(text.shape[-1], dim=-1)[:2]
    return host_module.modulate(half.norm1(text), shift, scale)


HOST = SD35Host()
