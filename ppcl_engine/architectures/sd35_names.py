"""SD3.5's tensors by diffusers' names and by ComfyUI's."""

from __future__ import annotations

from .base import Part
from .names import NameTable, tensors_of

BLOCKS, COMFYUI_BLOCKS = "transformer_blocks.", "joint_blocks."
OUTER_NAMES = {  # diffusers' module -> ComfyUI's
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    # diffusers: scale, shift; ComfyUI: shift, scale
    "norm_out.linear": ("final_layer.adaLN_modulation.1", (1, 0), 2),
    "proj_out": "final_layer.linear",
}
POSITIONS = {"pos_embed.pos_embed": Part("pos_embed")}
BLOCK_NAMES = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    **{f"attn.to_{m}": ("x_block.attn.qkv", (n,), 3) for n, m in enumerate("qkv")},
    **{f"attn.add_{m}_proj": ("context_block.attn.qkv", (n,), 3) for n, m in enumerate("qkv")},
    **{f"attn2.to_{m}": ("x_block.attn2.qkv", (n,), 3) for n, m in enumerate("qkv")},
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
BLOCK_NORMS = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
}
COMFYUI_NAMES = NameTable(
    POSITIONS,
    tensors_of(OUTER_NAMES),
    tensors_of(BLOCK_NAMES, f"{BLOCKS}{{}}.", f"{COMFYUI_BLOCKS}{{}}."),
    tensors_of(BLOCK_NORMS, f"{BLOCKS}{{}}.", f"{COMFYUI_BLOCKS}{{}}.", {"weight": "weight"}),
)
COMFYUI_PROJECTIONS = {
    "ffn_image": {"map": "x_block.mlp"},
    "ffn_text": {"map": "context_block.mlp"},
    "text": {"map": "context_block.norm1.projection", "step": "context_block.mlp"},
}
