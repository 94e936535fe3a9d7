"""Krea 2's tensors by diffusers' names and by ComfyUI's."""

from __future__ import annotations

from .base import Part
from .names import NameTable, tensors_of

BLOCKS = "transformer_blocks."
TEXT_BLOCKS = ("text_fusion.layerwise_blocks.", "text_fusion.refiner_blocks.")
OUTER_NAMES = {  # diffusers' module -> ComfyUI's
    "img_in": "first",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "final_layer.linear": "last.linear",
}
OUTER_NORMS = {"txt_in.norm": "txtmlp.0", "final_layer.norm": "last.norm"}
BLOCK_MAPS = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_gate": "attn.gate",
    "attn.to_out.0": "attn.wo",
    "ff.gate": "mlp.gate",
    "ff.up": "mlp.up",
    "ff.down": "mlp.down",
}
BLOCK_NORMS = {
    "norm1": "prenorm",
    "norm2": "postnorm",
    "attn.norm_q": "attn.qknorm.qnorm",
    "attn.norm_k": "attn.qknorm.knorm",
}
TABLES = {
    f"{BLOCKS}{{}}.scale_shift_table": Part("blocks.{}.mod.lin", rows=6),
    "final_layer.scale_shift_table": Part("last.modulation.lin"),
}
WEIGHT, SCALE = {"weight": "weight"}, {"weight": "scale"}
PREFIXES = {
    f"{BLOCKS}{{}}.": "blocks.{}.",
    **{f"{name}{{}}.": f"{name.replace('text_fusion', 'txtfusion')}{{}}." for name in TEXT_BLOCKS},
}
COMFYUI_NAMES = NameTable(
    TABLES,
    tensors_of(OUTER_NAMES),
    tensors_of(OUTER_NORMS, leaves=SCALE),
    tensors_of({"text_fusion.projector": "txtfusion.projector"}, leaves=WEIGHT),
    *(tensors_of(BLOCK_MAPS, *prefixes, WEIGHT) for prefixes in PREFIXES.items()),
    *(tensors_of(BLOCK_NORMS, *prefixes, SCALE) for prefixes in PREFIXES.items()),
)
