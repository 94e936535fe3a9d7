"""FLUX.1's tensors by diffusers' names and by ComfyUI's."""

from __future__ import annotations

from .names import NameTable, tensors_of

DOUBLE, SINGLE = "transformer_blocks.", "single_transformer_blocks."
OUTER_NAMES = {  # diffusers' module -> ComfyUI's
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    # diffusers: scale, shift; ComfyUI: shift, scale
    "norm_out.linear": ("final_layer.adaLN_modulation.1", (1, 0), 2),
    "proj_out": "final_layer.linear",
}
DOUBLE_NAMES = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    **{f"attn.to_{m}": ("img_attn.qkv", (n,), 3) for n, m in enumerate("qkv")},
    **{f"attn.add_{m}_proj": ("txt_attn.qkv", (n,), 3) for n, m in enumerate("qkv")},
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE_NAMES = {
    "norm.linear": "modulation.lin",
    **{f"attn.to_{m}": ("linear1", (n,), 7) for n, m in enumerate("qkv")},
    "proj_mlp": ("linear1", (3, 4, 5, 6), 7),  # four times as wide as q
    "proj_out": "linear2",
}
SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
COMFYUI_NAMES = NameTable(
    tensors_of(OUTER_NAMES),
    tensors_of(DOUBLE_NAMES, f"{DOUBLE}{{}}.", "double_blocks.{}."),
    tensors_of(DOUBLE_NORMS, f"{DOUBLE}{{}}.", "double_blocks.{}.", {"weight": "scale"}),
    tensors_of(SINGLE_NAMES, f"{SINGLE}{{}}.", "single_blocks.{}."),
    tensors_of(SINGLE_NORMS, f"{SINGLE}{{}}.", "single_blocks.{}.", {"weight": "scale"}),
    spellings={"weight": "scale"},  # as ComfyUI 0.14 and later save norms
)
COMFYUI_PROJECTIONS = {
    "ffn_image": {"map": "img_mlp"},
    "ffn_text": {"map": "txt_mlp"},
    # reads the block's input, and replaces the MLP's first map and its activation
    "ffn_joint": {"map": "mlp_act"},
    "text": {"map": "txt_norm1.projection", "step": "txt_mlp"},
}
