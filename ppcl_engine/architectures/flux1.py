"""FLUX.1: dual-stream ("double") blocks, then blocks that run text and image as one sequence ("single")
(method: Black Forest Labs' FLUX.1; diffusers' class)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from .base import BlockState, Inputs, Part
from .names import NameTable, tensors_of
from .packing import PackedLatents

ROTARY_SHARES = (2, 7, 7)  # of 16: picture, row, column; 16, 56, 56 of 128 in the released models
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
    "norm_out.linear": ("final_layer.adaLN_modulation.1", (1, 0), 2),  # scale, shift; there shift, scale
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
)


class Flux1(PackedLatents):
    name = "flux1"
    diffusers_class = "FluxTransformer2DModel"
    block_arguments = {"image": "hidden_states", "text": "encoder_hidden_states"}
    block_returns = ("text", "image")
    model_configs = {
        name: {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": doubles,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": [16, 56, 56],
        }
        for name, doubles in {"flux1_dev": 19, "flux1_lite": 8}.items()
    }
    released = None
    tiny_config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 4,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "guidance_embeds": True,
        "axes_dims_rope": [2, 6, 8],
    }

    def detect(self, keys: Iterable[str]) -> bool:
        """By what neither Qwen-Image nor other models with double and single blocks have, in either layout."""
        keys = set(keys)
        diffusers = {"context_embedder.weight", f"{DOUBLE}0.norm1_context.linear.weight", f"{SINGLE}0.proj_mlp.weight"}
        comfyui = {"txt_in.weight", "double_blocks.0.txt_mod.lin.weight", "single_blocks.0.linear1.weight"}
        return diffusers <= keys or comfyui <= keys

    def infer_config(self, shapes: Callable[[str], tuple[int, ...]], keys: Iterable[str]) -> dict:
        """Configuration from shapes alone, for files without one (ComfyUI single files)."""
        keys = list(keys)
        width, in_channels = shapes("x_embedder.weight")
        out_channels = shapes("proj_out.weight")[0]
        head = shapes(f"{DOUBLE}0.attn.norm_q.weight")[0]
        config = {
            "patch_size": 1,
            "in_channels": in_channels,
            "num_layers": _depth(keys, DOUBLE),
            "num_single_layers": _depth(keys, SINGLE),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes("context_embedder.weight")[1],
            "pooled_projection_dim": shapes("time_text_embed.text_embedder.linear_1.weight")[1],
            "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in keys,
            "axes_dims_rope": [head * share // 16 for share in ROTARY_SHARES],
        }
        return config if out_channels == in_channels else {**config, "out_channels": out_channels}

    def num_blocks(self, config: dict) -> int:
        return config["num_layers"] + config["num_single_layers"]

    def sections(self, config: dict) -> tuple[range, ...]:
        """Double blocks, single blocks."""
        return range(config["num_layers"]), range(config["num_layers"], self.num_blocks(config))

    def with_blocks(self, config: dict, indices: Sequence[int]) -> dict:
        doubles = sum(index < config["num_layers"] for index in indices)
        return {**config, "num_layers": doubles, "num_single_layers": len(indices) - doubles}

    def width(self, config: dict) -> int:
        return config["attention_head_dim"] * config["num_attention_heads"]

    def block_prefix(self, config: dict, index: int) -> str:
        doubles = config["num_layers"]
        return f"{DOUBLE}{index}." if index < doubles else f"{SINGLE}{index - doubles}."

    def build_block(self, config: dict, index: int) -> nn.Module:
        from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

        kind = FluxTransformerBlock if index < config["num_layers"] else FluxSingleTransformerBlock
        return kind(
            dim=self.width(config),
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
        )

    def build_outer(self, config: dict) -> nn.Module:
        """diffusers' model without a block: embeddings and the final layer."""
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel.from_config({**config, "num_layers": 0, "num_single_layers": 0})

    def assemble(self, outer: nn.Module, config: dict, blocks: list[nn.Module]) -> nn.Module:
        """diffusers' model with these blocks; its forward is diffusers' own."""
        doubles = config["num_layers"]
        outer.transformer_blocks = nn.ModuleList(blocks[:doubles])
        outer.single_transformer_blocks = nn.ModuleList(blocks[doubles:])
        outer.register_to_config(num_layers=doubles, num_single_layers=len(blocks) - doubles)
        return outer

    def used_streams(self, config: dict, index: int) -> tuple[str, ...]:
        """The last block's text is never read."""
        return ("image",) if index == self.num_blocks(config) - 1 else ("image", "text")

    def embed(self, outer: nn.Module, inputs: Inputs) -> BlockState:
        """All that diffusers' forward does before its loops over blocks. The text is never masked: a model of
        this kind was trained with its padding, which counts as real."""
        image = outer.x_embedder(inputs["hidden_states"])
        times = [inputs["timestep"].to(image.dtype) * 1000]
        if self.takes_guidance(outer.config):
            times.append(inputs["guidance"].to(image.dtype) * 1000)
        conditioning = outer.time_text_embed(*times, inputs["pooled_projections"])
        text = outer.context_embedder(inputs["encoder_hidden_states"])
        rotary = outer.pos_embed(torch.cat([self._text_ids(inputs), self._image_ids(inputs)]))
        return BlockState(image, text, conditioning, None, rotary)

    def run_block(self, block: nn.Module, state: BlockState) -> BlockState:
        text, image = block(
            hidden_states=state.image,
            encoder_hidden_states=state.text,
            temb=state.conditioning,
            image_rotary_emb=state.extra,
        )
        return state.with_streams(image, text)

    def final_image(self, outer: nn.Module, state: BlockState) -> torch.Tensor:
        return state.image

    def finish(self, outer: nn.Module, state: BlockState) -> torch.Tensor:
        return outer.proj_out(outer.norm_out(state.image, state.conditioning))

    def takes_guidance(self, config: Mapping) -> bool:
        return bool(config.get("guidance_embeds"))

    def call(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """diffusers' own forward on our inputs."""
        return model(
            hidden_states=inputs["hidden_states"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            pooled_projections=inputs["pooled_projections"],
            timestep=inputs["timestep"],
            img_ids=self._image_ids(inputs),
            txt_ids=self._text_ids(inputs),
            guidance=inputs["guidance"] if self.takes_guidance(model.config) else None,
            return_dict=False,
        )[0]

    def to_comfyui(self, key: str, keys: Collection[str] = ()) -> Part:
        return COMFYUI_NAMES.place(key)

    def from_comfyui(self, name: str) -> tuple[str, ...]:
        return COMFYUI_NAMES.contents(name)

    def random_inputs(self, config: dict, samples: int, grid: tuple, text_tokens: int, device: str) -> Inputs:
        """Standard normal inputs of this shape, for tests, timing and counting."""
        frames, rows, columns = grid
        inputs = {
            "hidden_states": torch.randn(samples, frames * rows * columns, config["in_channels"], device=device),
            "encoder_hidden_states": torch.randn(samples, text_tokens, config["joint_attention_dim"], device=device),
            "pooled_projections": torch.randn(samples, config["pooled_projection_dim"], device=device),
            "timestep": torch.rand(samples, device=device),
            "grid": torch.tensor([grid]),
        }
        if self.takes_guidance(config):
            inputs["guidance"] = 1 + 4 * torch.rand(samples, device=device)
        return inputs

    def _text_ids(self, inputs: Inputs) -> torch.Tensor:
        text = inputs["encoder_hidden_states"]
        return torch.zeros(text.shape[1], 3, device=text.device)

    def _image_ids(self, inputs: Inputs) -> torch.Tensor:
        """[image_tokens, 3]: (picture, row, column), as diffusers' pipelines count them."""
        ids = [
            torch.cartesian_prod(torch.tensor([float(n)]), torch.arange(float(rows)), torch.arange(float(columns)))
            for n, (_, rows, columns) in enumerate(inputs["grid"].tolist())
        ]
        return torch.cat(ids).to(inputs["hidden_states"].device)


def _depth(keys: Iterable[str], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in keys if key.startswith(prefix))
