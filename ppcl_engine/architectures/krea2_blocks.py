"""Two of diffusers' modules of Krea 2 with forwards of our own. Imports diffusers, which takes
seconds, so it is imported when a block is built."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_krea2 import Krea2RMSNorm, Krea2TransformerBlock
from torch import nn

from .modules import AnyModule
from .projections import linear_like


class ExactNorm(Krea2RMSNorm):
    """Adds 1 to the scale in float32, in models of every precision, as ComfyUI does, and as
    diffusers' loader has it, which leaves these scales in float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scale = self.weight.float() + 1.0
        normed = F.rms_norm(hidden_states.float(), (self.dim,), weight=scale, eps=self.eps)
        return normed.to(hidden_states.dtype)


class PaperBlock(Krea2TransformerBlock):
    """A block whose FFN is the paper's projection: x + P(x) behind attention.

    Shift, scale and gate are sums of the model's and of a table in the block, so no table could
    leave x as it is: the FFN's halves of both are not read.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        modulation = temb.unflatten(-1, (6, -1)) + self.scale_shift_table
        scale, shift, gate = modulation.unbind(-2)[:3]
        attended = self.attn(
            (1.0 + scale) * self.norm1(hidden_states) + shift,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        hidden_states = hidden_states + gate * attended
        return hidden_states + self.ff(self.norm2(hidden_states))


def with_exact_norms(module: AnyModule) -> AnyModule:
    for norm in module.modules():
        if type(norm) is Krea2RMSNorm:
            norm.__class__ = ExactNorm
    return module


def project(block: AnyModule, form: str) -> None:
    """Puts a linear map in the place of the FFN."""
    width = block.ff.gate.in_features
    block.ff = linear_like(block.ff.gate, width, width)
    if form == "paper":
        block.norm2 = nn.Identity()
        block.__class__ = PaperBlock
