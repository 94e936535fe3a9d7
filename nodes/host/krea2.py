"""Krea 2 in the host: blocks that run text and image as one sequence, under a modulation that all of
them share plus a vector of each block's own."""

from __future__ import annotations

from functools import partial

import comfy.ldm.krea2.model as host_module
import torch
from torch import nn

from ...ppcl_engine.architectures import architecture_named
from ...ppcl_engine.models.layout import Place
from .base import BlockList, Host
from .blocks import Texts

STOCK_WIDTH = 48 * 128  # of the released model, which the host loads by itself
PATCH = 2
NAMES = {  # argument of the host's class -> entry of the configuration
    "tdim": "timestep_embed_dim",
    "txtdim": "text_hidden_dim",
    "heads": "num_attention_heads",
    "kvheads": "num_key_value_heads",
    "layers": "num_layers",
    "txtlayers": "num_text_layers",
    "txtheads": "text_num_attention_heads",
    "txtkvheads": "text_num_key_value_heads",
}


class Krea2Host(Host):
    engine = architecture_named("krea2")
    stock = ("Krea2",)
    module, model = host_module, "SingleStreamDiT"
    lists = (
        BlockList(
            name="blocks",
            kind="SingleStreamBlock",
            depth="num_layers",
            reads={"joint": "x"},
            gives=("joint",),
        ),
    )
    told = ("intermediate_size", "rope_theta")
    mark = "txtfusion.projector.weight"
    text_map = ""
    viewed = ("mod",)
    replaced = {"ffn_joint": ("mlp.",)}

    def vacated(self, place: Place) -> tuple[str, ...]:
        paper = any(site.form == "paper" for site in place.ffn)
        return (*super().vacated(place), *(("postnorm.",) if paper else ()))

    def is_stock(self, tensors) -> bool:
        return tensors["first.weight"].shape[0] == STOCK_WIDTH

    def project_ffn(self, block: nn.Module, kind: str, form: str, projection: nn.Module) -> None:
        block.mlp = projection
        if form == "paper":
            block.postnorm = nn.Identity()
            block.mod.forward = partial(_attention_alone, block.mod)

    def arguments(self, config) -> dict:
        head, axes = config["attention_head_dim"], config["axes_dims_rope"]
        side = 6 * (head // 16)
        if axes != [head - 2 * side, side, side]:
            raise ValueError(
                f"ComfyUI reads Krea 2's places by rotary axes {[head - 2 * side, side, side]}, "
                f"but the file's plan says {axes}; export it again"
            )
        return {
            **{argument: config[name] for argument, name in NAMES.items()},
            "features": self.engine.width(config),
            "channels": config["in_channels"] // PATCH**2,
            "patch": PATCH,
            "theta": config.get("rope_theta", 1000.0),
        }

    def count_text_tokens(self, transformer: nn.Module, texts: Texts) -> None:
        """Counts the text as it enters the sequence."""
        transformer.txtmlp.register_forward_hook(partial(_leave, texts))


def _attention_alone(modulation: nn.Module, shared: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A block's modulation where the paper's form adds P(x) to the stream x itself: of the FFN's
    half, scale and shift are 0 and the gate is 1."""
    scale, shift, gate = type(modulation).forward(modulation, shared)[:3]
    nothing = torch.zeros_like(gate)
    return scale, shift, gate, nothing, nothing, nothing + 1


def _leave(texts: Texts, module: nn.Module, arguments, text: torch.Tensor) -> None:
    texts.tokens = text.shape[1]


HOST = Krea2Host()
