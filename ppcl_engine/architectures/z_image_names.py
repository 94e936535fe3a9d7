"""Z-Image's tensors by diffusers' names and by ComfyUI's."""

from __future__ import annotations

from .base import Part
from .names import NameTable, tensors_of

BLOCKS = "layers."
REFINERS = ("noise_refiner.", "context_refiner.")
PATCH = "2-1"  # how diffusers names the layers for patches of 2 x 2 positions of one frame
OUTER_NAMES = {  # diffusers' module -> ComfyUI's
    f"all_x_embedder.{PATCH}": "x_embedder",
    f"all_final_layer.{PATCH}.linear": "final_layer.linear",
    f"all_final_layer.{PATCH}.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
    "cap_embedder.{}": "cap_embedder.{}",
}
PADS = {name: Part(name) for name in ("x_pad_token", "cap_pad_token")}
BLOCK_MAPS = {
    **{f"attention.to_{m}": ("attention.qkv", (n,), 3) for n, m in enumerate("qkv")},
    "attention.to_out.0": "attention.out",
    "attention.norm_q": "attention.q_norm",
    "attention.norm_k": "attention.k_norm",
    **{name: name for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
    **{f"feed_forward.w{n}": f"feed_forward.w{n}" for n in (1, 2, 3)},
}
WEIGHT = {"weight": "weight"}
COMFYUI_NAMES = NameTable(
    PADS,
    tensors_of(OUTER_NAMES),
    *(tensors_of(BLOCK_MAPS, f"{b}{{}}.", f"{b}{{}}.", WEIGHT) for b in (BLOCKS, *REFINERS)),
    *(
        tensors_of({"adaLN_modulation.0": "adaLN_modulation.0"}, f"{b}{{}}.", f"{b}{{}}.")
        for b in (BLOCKS, REFINERS[0])
    ),
)
