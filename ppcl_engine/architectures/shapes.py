"""The tensors of blocks and outer parts, by diffusers' names: what diffusers' classes would make,
without importing diffusers, which takes seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from .base import Architecture
from .folded import Folding, folding_of
from .qwen_image_21 import FFN_RATIO, TEXT_WIDTH

Shapes = dict[str, tuple[int, ...]]

TIME_CHANNELS = 256  # of the sinusoids of a timestep
FFN = 4  # widths inside an FFN
Z_TIME_CHANNELS = 256  # of what Z-Image's modulations read, at most
Z_TIME_WIDTH = 1024  # inside its embedder of a timestep
TABLES = ("pos_embed.pos_embed", "folding.timesteps", "folding.directions")
"""ends of the names of tensors that training never moves, which are not parameters"""
TEXT_MAPS = ("attn.add_", "attn.to_add_out.", "txt_mlp.", "ff_context.")
"""prefixes of a block's linear maps that read text tokens, where text has maps of its own"""


def block_shapes(architecture: Architecture, config: dict, index: int) -> Shapes:
    """Raises ValueError for a configuration that no block is made for."""
    return _BLOCKS[architecture.name](config, architecture.width(config), index)


def outer_shapes(architecture: Architecture, config: dict) -> Shapes:
    """Embeddings and the final layer."""
    return _OUTER[architecture.name](config, architecture.width(config))


def number_of_values(shapes: Mapping[str, tuple[int, ...]], tables: bool) -> int:
    """`tables`: whether those count that are not parameters."""
    return sum(
        math.prod(shape) for name, shape in shapes.items() if tables or not name.endswith(TABLES)
    )


def has_one_stream(shapes: Mapping[str, object]) -> bool:
    """Whether the block runs text and image as one sequence, through the same maps."""
    return not any(name.startswith(TEXT_MAPS) for name in shapes)


def _linear(name: str, read: int, written: int) -> Shapes:
    return {f"{name}.weight": (written, read), f"{name}.bias": (written,)}


def _mlp(name: str, read: int, width: int) -> Shapes:
    """The two maps of an embedder."""
    return _linear(f"{name}.linear_1", read, width) | _linear(f"{name}.linear_2", width, width)


def _ffn(name: str, width: int) -> Shapes:
    return _linear(f"{name}.net.0.proj", width, FFN * width) | _linear(
        f"{name}.net.2", FFN * width, width
    )


def _maps(names: tuple[str, ...], width: int) -> Shapes:
    return {key: shape for name in names for key, shape in _linear(name, width, width).items()}


def _norms(names: tuple[str, ...], head: int, kind: str | None = "rms_norm") -> Shapes:
    """The norms of q and k."""
    parts = {"rms_norm": ("weight",), "layer_norm": ("weight", "bias"), None: ()}
    if kind not in parts:
        raise ValueError(f"qk_norm {kind!r} is not read; known: rms_norm, layer_norm")
    return {f"{name}.{part}": (head,) for name in names for part in parts[kind]}


def _attention(name: str, width: int, head: int, kind: str | None = "rms_norm") -> Shapes:
    norms = _norms((f"{name}.norm_q", f"{name}.norm_k"), head, kind)
    return norms | _maps((f"{name}.to_q", f"{name}.to_k", f"{name}.to_v"), width)


def _joint_attention(config: dict, width: int, kind: str | None = "rms_norm") -> Shapes:
    """Both streams have maps of their own; the text's output is not among them."""
    head = config["attention_head_dim"]
    added = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    return (
        _attention("attn", width, head, kind)
        | _maps((*added, "attn.to_out.0"), width)
        | _norms(("attn.norm_added_q", "attn.norm_added_k"), head, kind)
    )


def _qwen_block(config: dict, width: int, index: int) -> Shapes:
    folding = folding_of(config)
    return (
        _modulation("img_mod.1", width, folding)
        | _joint_attention(config, width)
        | _maps(("attn.to_add_out",), width)
        | _ffn("img_mlp", width)
        | _modulation("txt_mod.1", width, folding)
        | _ffn("txt_mlp", width)
    )


def _modulation(name: str, width: int, folding: Folding | None) -> Shapes:
    if folding is None:
        return _linear(name, width, 6 * width)
    if folding.form == "table":
        return {f"{name}.weight": (6 * width, folding.columns)}
    return _linear(name, folding.inputs, 6 * width)


def _qwen_outer(config: dict, width: int) -> Shapes:
    folding, text = folding_of(config), config["joint_attention_dim"]
    written = (config.get("out_channels") or config["in_channels"]) * config["patch_size"] ** 2
    shapes = _mlp("time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    if config.get("use_additional_t_cond"):
        shapes["time_text_embed.addition_t_embedding.weight"] = (2, width)
    if folding is not None and folding.form == "table":
        shapes["time_text_embed.folding.timesteps"] = (folding.inputs,)
    elif folding is not None:
        shapes["time_text_embed.folding.directions"] = (width, folding.inputs)
    return (
        shapes
        | {"txt_norm.weight": (text,)}
        | _linear("img_in", config["in_channels"], width)
        | _linear("txt_in", text, width)
        | _final(width, written)
    )


def _final(width: int, written: int) -> Shapes:
    return _linear("norm_out.linear", width, 2 * width) | _linear("proj_out", width, written)


def _flux_block(config: dict, width: int, index: int) -> Shapes:
    if index >= config["num_layers"]:
        return (
            _linear("norm.linear", width, 3 * width)
            | _linear("proj_mlp", width, FFN * width)
            | _linear("proj_out", (1 + FFN) * width, width)
            | _attention("attn", width, config["attention_head_dim"])
        )
    return (
        _linear("norm1.linear", width, 6 * width)
        | _linear("norm1_context.linear", width, 6 * width)
        | _joint_attention(config, width)
        | _maps(("attn.to_add_out",), width)
        | _ffn("ff", width)
        | _ffn("ff_context", width)
    )


def _flux_outer(config: dict, width: int) -> Shapes:
    written = (config.get("out_channels") or config["in_channels"]) * config["patch_size"] ** 2
    guidance = ("guidance_embedder",) if config.get("guidance_embeds") else ()
    shapes: Shapes = {}
    for name in ("timestep_embedder", *guidance):
        shapes |= _mlp(f"time_text_embed.{name}", TIME_CHANNELS, width)
    return (
        shapes
        | _mlp("time_text_embed.text_embedder", config["pooled_projection_dim"], width)
        | _linear("context_embedder", config["joint_attention_dim"], width)
        | _linear("x_embedder", config["in_channels"], width)
        | _final(width, written)
    )


def _sd35_block(config: dict, width: int, index: int) -> Shapes:
    dual = index in (config.get("dual_attention_layers") or ())
    last, kind = index == config["num_layers"] - 1, config["qk_norm"]
    shapes = _linear("norm1.linear", width, (9 if dual else 6) * width)
    shapes |= _linear("norm1_context.linear", width, (2 if last else 6) * width)
    shapes |= _joint_attention(config, width, kind)
    shapes |= {} if last else _maps(("attn.to_add_out",), width)
    if dual:
        shapes |= _attention("attn2", width, config["attention_head_dim"], kind)
        shapes |= _maps(("attn2.to_out.0",), width)
    shapes |= _ffn("ff", width)
    return shapes if last else shapes | _ffn("ff_context", width)


def _sd35_outer(config: dict, width: int) -> Shapes:
    side, channels = config["patch_size"], config["in_channels"]
    return (
        {
            "pos_embed.pos_embed": (1, config["pos_embed_max_size"] ** 2, width),
            "pos_embed.proj.weight": (width, channels, side, side),
            "pos_embed.proj.bias": (width,),
        }
        | _mlp("time_text_embed.timestep_embedder", TIME_CHANNELS, width)
        | _mlp("time_text_embed.text_embedder", config["pooled_projection_dim"], width)
        | _linear(
            "context_embedder", config["joint_attention_dim"], config["caption_projection_dim"]
        )
        | _final(width, config["out_channels"] * side**2)
    )


def _z_image_block(config: dict, width: int, index: int) -> Shapes:
    """Its maps have no bias, but for the modulation."""
    head, inner = width // config["n_heads"], int(width / 3 * 8)
    maps = {f"attention.{name}.weight": (width, width) for name in ("to_q", "to_k", "to_v")}
    norms = ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2")
    return (
        _norms(("attention.norm_q", "attention.norm_k"), head)
        | maps
        | {"attention.to_out.0.weight": (width, width)}
        | {f"feed_forward.{name}.weight": (inner, width) for name in ("w1", "w3")}
        | {"feed_forward.w2.weight": (width, inner)}
        | {f"{name}.weight": (width,) for name in norms}
        | _linear("adaLN_modulation.0", min(width, Z_TIME_CHANNELS), 4 * width)
    )


def _z_image_outer(config: dict, width: int) -> Shapes:
    """The refiners are blocks; those of the text are not modulated."""
    time, text = min(width, Z_TIME_CHANNELS), config["cap_feat_dim"]
    patch = config["in_channels"] * 4  # a token is 2 x 2 latents
    shapes: Shapes = {"x_pad_token": (1, width), "cap_pad_token": (1, width)}
    for index in range(config["n_refiner_layers"]):
        block = _z_image_block(config, width, index)
        plain = {n: s for n, s in block.items() if not n.startswith("adaLN_modulation.")}
        shapes |= {f"noise_refiner.{index}.{name}": shape for name, shape in block.items()}
        shapes |= {f"context_refiner.{index}.{name}": shape for name, shape in plain.items()}
    return (
        shapes
        | _linear("all_x_embedder.2-1", patch, width)
        | _linear("all_final_layer.2-1.linear", width, patch)
        | _linear("all_final_layer.2-1.adaLN_modulation.1", time, width)
        | _linear("t_embedder.mlp.0", TIME_CHANNELS, Z_TIME_WIDTH)
        | _linear("t_embedder.mlp.2", Z_TIME_WIDTH, time)
        | {"cap_embedder.0.weight": (text,)}
        | _linear("cap_embedder.1", text, width)
    )


def _qwen21_block(config: dict, width: int, index: int) -> Shapes:
    """No map has a bias, and the modulation is not the block's."""
    inner = width * config.get("mlp_ratio", FFN_RATIO)
    square = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    return (
        _norms(("attn.norm_q", "attn.norm_k"), config["attention_head_dim"])
        | {f"{name}.weight": (width, width) for name in square}
        | {f"img_mlp.{name}.weight": (inner, width) for name in ("proj", "gate_layer")}
        | {"img_mlp.out.weight": (width, inner)}
    )


def _qwen21_outer(config: dict, width: int) -> Shapes:
    text, channels = config.get("context_in_dim", TEXT_WIDTH), config["in_channels"]
    return {
        "time_text_embed.timestep_embedder.linear_1.weight": (width, TIME_CHANNELS),
        "time_text_embed.timestep_embedder.linear_2.weight": (width, width),
        "txt_in.text_norm.weight": (text,),
        "txt_in.in_layer.weight": (width, text),
        "txt_in.out_layer.weight": (width, width),
        "img_in.weight": (width, channels),
        "modulation.1.weight": (4 * width, width),
        "norm_out.linear.weight": (width, width),
        "proj_out.weight": (config.get("out_channels") or channels, width),
    }


_BLOCKS: dict[str, Callable[[dict, int, int], Shapes]] = {
    "qwen_image": _qwen_block,
    "flux1": _flux_block,
    "sd35": _sd35_block,
    "z_image": _z_image_block,
    "qwen_image_21": _qwen21_block,
}
_OUTER: dict[str, Callable[[dict, int], Shapes]] = {
    "qwen_image": _qwen_outer,
    "flux1": _flux_outer,
    "sd35": _sd35_outer,
    "z_image": _z_image_outer,
    "qwen_image_21": _qwen21_outer,
}
