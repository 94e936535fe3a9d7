"""SD3.5 Large and Medium: joint blocks; the last returns no text, and some attend to the image
twice (diffusers' class)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isqrt

import torch
from torch import nn

from .base import Architecture, BlockState, Inputs, Part
from .modules import AnyModule
from .packing import PackedLatents
from .projections import (
    Nothing,
    ProjectedLastNorm,
    ProjectedNorm,
    SharedText,
    linear_like,
    publish,
    watched,
    without_ffn,
)
from .sd35_names import BLOCKS, COMFYUI_BLOCKS, COMFYUI_NAMES, COMFYUI_PROJECTIONS

SUFFIXES = {"image": "", "text": "_context"}  # endings of the names of a block's parts


class SD35(PackedLatents, Architecture):
    name = "sd35"
    diffusers_class = "SD3Transformer2DModel"
    gguf_name = "sd3"
    block_arguments = {"image": "hidden_states", "text": "encoder_hidden_states"}
    block_returns = ("text", "image")
    caption_inputs = ("encoder_hidden_states", "pooled_projections")
    timestep_modulations, marks = (), {}
    time_embedder = "time_text_embed"
    model_configs = {
        name: {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": blocks,
            "attention_head_dim": 64,
            "num_attention_heads": blocks,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 64 * blocks,
            "pooled_projection_dim": 2048,
            "out_channels": 16,
            "pos_embed_max_size": positions,
            "dual_attention_layers": list(range(dual)),
            "qk_norm": "rms_norm",
        }
        for name, blocks, positions, dual in (
            ("sd35_large", 38, 192, 0),
            ("sd35_medium", 24, 384, 13),
        )
    }
    projection_names = {
        "ffn_image": {"map": "ff"},
        "ffn_text": {"map": "ff_context"},
        "text": {"map": "norm1_context.projection", "step": "ff_context"},
    }
    comfyui_projections = COMFYUI_PROJECTIONS
    replaced_names = {
        "ffn_image": ("ff.",),
        "ffn_text": ("ff_context.",),
        "text": ("norm1_context.", "ff_context.", "attn.to_add_out."),
    }
    cut_names = {("ffn_image", "paper"): ("norm1.",), ("ffn_text", "paper"): ("norm1_context.",)}
    released = None
    tiny_config = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 6,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "out_channels": 4,
        "pos_embed_max_size": 12,
        "dual_attention_layers": [0, 1, 2],
        "qk_norm": "rms_norm",
    }

    def detect(self, keys: Iterable[str]) -> bool:
        """By tensors that no model of double blocks has, in either layout; SD3.0 has no norms of q
        and k."""
        keys = set(keys)
        diffusers = {
            "pos_embed.pos_embed",
            "context_embedder.weight",
            f"{BLOCKS}0.attn.norm_added_q.weight",
        }
        comfyui = {
            "pos_embed",
            "context_embedder.weight",
            f"{COMFYUI_BLOCKS}0.context_block.attn.ln_q.weight",
        }
        return diffusers <= keys or comfyui <= keys

    def infer_config(self, shapes: Callable[[str], tuple[int, ...]], keys: Iterable[str]) -> dict:
        """Configuration from shapes alone, for files without one (ComfyUI single files)."""
        keys = set(keys)
        blocks = {int(key.split(".")[1]) for key in keys if key.startswith(BLOCKS)}
        width, in_channels, patch, _ = shapes("pos_embed.proj.weight")
        head = shapes(f"{BLOCKS}0.attn.norm_q.weight")[0]
        caption_width, text_width = shapes("context_embedder.weight")
        return {
            "sample_size": 128,
            "patch_size": patch,
            "in_channels": in_channels,
            "num_layers": 1 + max(blocks),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": text_width,
            "caption_projection_dim": caption_width,
            "pooled_projection_dim": shapes("time_text_embed.text_embedder.linear_1.weight")[1],
            "out_channels": shapes("proj_out.weight")[0] // patch**2,
            "pos_embed_max_size": isqrt(shapes("pos_embed.pos_embed")[1]),
            "dual_attention_layers": [
                n for n in sorted(blocks) if f"{BLOCKS}{n}.attn2.to_q.weight" in keys
            ],
            "qk_norm": "rms_norm",
        }

    def num_blocks(self, config: dict) -> int:
        return config["num_layers"]

    def sections(self, config: dict) -> tuple[range, ...]:
        """All blocks but the last, and the last, the only one that returns no text."""
        last = config["num_layers"] - 1
        return range(last), range(last, last + 1)

    def with_blocks(self, config: dict, indices: Sequence[int]) -> dict:
        dual = [new for new, old in enumerate(indices) if _is_dual(config, old)]
        return {**config, "num_layers": len(indices), "dual_attention_layers": dual}

    def width(self, config: dict) -> int:
        return config["attention_head_dim"] * config["num_attention_heads"]

    def token_channels(self, config: dict) -> int:
        return config["in_channels"] * config["patch_size"] ** 2

    def block_prefix(self, config: dict, index: int) -> str:
        return f"{BLOCKS}{index}."

    def build_block(self, config: dict, index: int) -> nn.Module:
        from diffusers.models.attention import JointTransformerBlock

        return JointTransformerBlock(
            dim=self.width(config),
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
            context_pre_only=index == config["num_layers"] - 1,
            qk_norm=config["qk_norm"],
            use_dual_attention=_is_dual(config, index),
        )

    def build_outer(self, config: dict) -> AnyModule:
        """diffusers' model without a block: embeddings and the final layer."""
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel.from_config({**config, "num_layers": 0})

    def assemble(self, outer: AnyModule, config: dict, blocks: list[AnyModule]) -> nn.Module:
        """diffusers' model with these blocks; its forward is diffusers' own, which asks each block
        whether it returns text."""
        for index, block in enumerate(blocks):
            block.context_pre_only = index == len(blocks) - 1
        outer.transformer_blocks = nn.ModuleList(blocks)
        outer.register_to_config(num_layers=len(blocks))
        return outer

    def used_streams(self, config: dict, index: int) -> tuple[str, ...]:
        """The last block returns no text."""
        return ("image",) if index == self.num_blocks(config) - 1 else ("image", "text")

    def embed(self, outer: AnyModule, inputs: Inputs) -> BlockState:
        """Everything that diffusers' forward does before its loop over blocks.

        The text is never masked: models of this kind were trained with padding as real tokens.
        """
        image = outer.pos_embed(self.unpack(inputs["hidden_states"], inputs["grid"])).contiguous()
        conditioning = outer.time_text_embed(
            inputs["timestep"] * 1000, inputs["pooled_projections"]
        )
        return BlockState(
            image, outer.context_embedder(inputs["encoder_hidden_states"]), conditioning
        )

    def run_block(self, block: AnyModule, state: BlockState) -> BlockState:
        """The last block returns no text, so its text stays as it came in."""
        shared: SharedText | None = getattr(block, "shared_text", None)
        if shared is not None:
            shared.value = state.modulated_text
        text, image = block(
            hidden_states=state.image, encoder_hidden_states=state.text, temb=state.conditioning
        )
        state = state.with_streams(image, state.text if text is None else text)
        return state if shared is None else replace(state, modulated_text=shared.value)

    def site_kinds(self, config: dict, index: int) -> tuple[str, ...]:
        """The last block has no FFN for the text."""
        return (
            ("text", "ffn_image")
            if index == self.num_blocks(config) - 1
            else ("text", "ffn_image", "ffn_text")
        )

    def project_ffn(self, block: AnyModule, kind: str, form: str) -> None:
        """paper: x + P(x) behind attention, modulation 6 d -> 3 d (9 d -> 6 d in a block that
        attends twice). gated: P between modulation and gate."""
        suffix = SUFFIXES[kind.removeprefix("ffn_")]
        norm = getattr(block, f"norm1{suffix}")
        width = norm.linear.in_features
        setattr(block, f"ff{suffix}", linear_like(norm.linear, width, width))
        if form == "paper":
            norm.linear = without_ffn(norm.linear)
            setattr(block, f"norm2{suffix}", nn.Identity())

    def project_text(self, block: AnyModule, source: SharedText, steps: bool) -> None:
        """The text loses its modulation, norm and FFN; its q, k, v maps stay."""
        like = block.attn.add_q_proj
        width = like.in_features
        kind = ProjectedLastNorm if block.context_pre_only else ProjectedNorm
        block.shared_text = source
        block.norm1_context = kind(linear_like(like, width, width), source, steps)
        block.norm2_context = nn.Identity()
        block.ff_context = linear_like(like, width, width) if steps else Nothing()
        if not block.context_pre_only:
            block.attn.to_add_out = nn.Identity()

    def publish_text(self, block: AnyModule, source: SharedText) -> None:
        """Keeps the text that enters joint attention, for the text group behind this block."""
        publish(block, block.attn.add_q_proj, source)

    def observe(
        self, block: AnyModule, state: BlockState
    ) -> tuple[BlockState, dict[str, torch.Tensor]]:
        """Runs the block; returns also what its parts read and gave, all [n, tokens, d].

        `text_modulated`, and for each stream (in the last block: the image) `<stream>_` +
        `before_ffn`, `ffn_input`, `ffn_output`, `after_ffn` (before a correction).
        """
        suffixes = {
            stream: s
            for stream, s in SUFFIXES.items()
            if stream == "image" or not block.context_pre_only
        }
        inputs = {"attn.add_q_proj": "text_modulated"}
        inputs |= {f"norm2{suffix}": f"{stream}_before_ffn" for stream, suffix in suffixes.items()}
        inputs |= {f"ff{suffix}": f"{stream}_ffn_input" for stream, suffix in suffixes.items()}
        outputs = {f"ff{suffix}": f"{stream}_ffn_output" for stream, suffix in suffixes.items()}
        with watched(block, inputs, outputs, ("text_after_ffn", "image_after_ffn")) as seen:
            after = self.run_block(block, state)
        return after, {name: tensor for name, tensor in seen.items() if tensor is not None}

    def final_image(self, outer: AnyModule, state: BlockState) -> torch.Tensor:
        return state.image

    def finish(self, outer: AnyModule, state: BlockState) -> torch.Tensor:
        """diffusers' final layer orders a token's values row, column, channel; ours are channel,
        row, column."""
        tokens = outer.proj_out(outer.norm_out(state.image, state.conditioning))
        side = outer.config.patch_size
        return tokens.unflatten(-1, (side, side, -1)).movedim(-1, -3).flatten(-3)

    def takes_guidance(self, config: Mapping) -> bool:
        return False

    def modulation_reads(self, config: dict) -> tuple[str, ...]:
        return "the timestep", "pooled text"

    def call(self, model: AnyModule, inputs: Inputs) -> torch.Tensor:
        """diffusers' own forward on our inputs."""
        latents = model(
            hidden_states=self.unpack(inputs["hidden_states"], inputs["grid"]),
            encoder_hidden_states=inputs["encoder_hidden_states"],
            pooled_projections=inputs["pooled_projections"],
            timestep=inputs["timestep"] * 1000,
            return_dict=False,
        )[0]
        return self.pack(latents)

    def latent_shape(self, config: dict, height: int, width: int) -> tuple[int, int, int]:
        """Here `in_channels` counts a latent's channels, not a token's."""
        return super().latent_shape({"in_channels": self.token_channels(config)}, height, width)

    def to_comfyui(self, key: str, keys: Collection[str]) -> Part:
        """The last block, which has no FFN for the text, stores the two parts of its text norm in
        reverse order."""
        part = COMFYUI_NAMES.place(key)
        block, norm, _ = key.partition("norm1_context.linear.")
        # as the FFN is named whole, and projected
        others = (f"{block}ff_context.net.2.weight", f"{block}ff_context.weight")
        last = norm and not any(name in keys for name in others)
        return replace(part, pieces=(1, 0), of=2) if last else part

    def from_comfyui(self, name: str) -> tuple[str, ...]:
        return COMFYUI_NAMES.contents(name)

    def random_inputs(
        self, config: dict, samples: int, grid: tuple, text_tokens: int, device: str
    ) -> Inputs:
        """Standard normal inputs of this shape, for tests, timing and counting."""
        frames, rows, columns = grid
        channels = self.token_channels(config)
        return {
            "hidden_states": torch.randn(samples, frames * rows * columns, channels, device=device),
            "encoder_hidden_states": torch.randn(
                samples, text_tokens, config["joint_attention_dim"], device=device
            ),
            "pooled_projections": torch.randn(
                samples, config["pooled_projection_dim"], device=device
            ),
            "timestep": torch.rand(samples, device=device),
            "grid": torch.tensor([grid]),
        }


def _is_dual(config: dict, index: int) -> bool:
    return index in config.get("dual_attention_layers", ())
