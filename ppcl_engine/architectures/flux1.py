"""FLUX.1: dual-stream ("double") blocks, then blocks that run text and image as one sequence
("single") (method: Black Forest Labs' FLUX.1; diffusers' class)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from .base import Architecture, BlockState, Inputs, Part
from .flux1_names import COMFYUI_NAMES, COMFYUI_PROJECTIONS, DOUBLE, SINGLE
from .modules import AnyModule
from .names import depth
from .packing import PackedLatents
from .projections import (
    AddedProjection,
    Nothing,
    PaddedLinear,
    ProjectedNorm,
    SharedText,
    cut_linear,
    linear_like,
    publish,
    watched,
)

ROTARY_SHARES = (2, 7, 7)  # of 16: picture, row, column; 16, 56, 56 of 128 in the released models
SUFFIXES = {"image": "", "text": "_context"}  # endings of the names of a double block's parts


class Flux1(PackedLatents, Architecture):
    name = "flux1"
    diffusers_class = "FluxTransformer2DModel"
    gguf_name = "flux"
    block_arguments = {"image": "hidden_states", "text": "encoder_hidden_states"}
    block_returns = ("text", "image")
    caption_inputs = ("encoder_hidden_states", "pooled_projections")
    timestep_modulations, marks = (), {}
    time_embedder = "time_text_embed"
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
    projection_names = {
        "ffn_image": {"map": "ff"},
        "ffn_text": {"map": "ff_context"},
        "ffn_joint": {"map": "proj_mlp"},
        "text": {"map": "norm1_context.projection", "step": "ff_context"},
    }
    comfyui_projections = COMFYUI_PROJECTIONS
    replaced_names = {
        "ffn_image": ("ff.",),
        "ffn_text": ("ff_context.",),
        "ffn_joint": ("proj_mlp.",),
        "text": ("norm1_context.", "ff_context.", "attn.to_add_out."),
    }
    cut_names = {
        ("ffn_image", "paper"): ("norm1.",),
        ("ffn_text", "paper"): ("norm1_context.",),
        ("ffn_joint", "gated"): ("proj_out.",),
    }
    forms = {"ffn_joint": ("gated",)}  # attention and FFN share a map and a gate
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
        """By tensors that no other model with double and single blocks has, in either layout."""
        keys = set(keys)
        diffusers = {
            "context_embedder.weight",
            f"{DOUBLE}0.norm1_context.linear.weight",
            f"{SINGLE}0.proj_mlp.weight",
        }
        comfyui = {
            "txt_in.weight",
            "double_blocks.0.txt_mod.lin.weight",
            "single_blocks.0.linear1.weight",
        }
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
            "num_layers": depth(keys, DOUBLE),
            "num_single_layers": depth(keys, SINGLE),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes("context_embedder.weight")[1],
            "pooled_projection_dim": shapes("time_text_embed.text_embedder.linear_1.weight")[1],
            "guidance_embeds": any(
                key.startswith("time_text_embed.guidance_embedder.") for key in keys
            ),
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
        from diffusers.models.transformers.transformer_flux import (
            FluxSingleTransformerBlock,
            FluxTransformerBlock,
        )

        kind = FluxTransformerBlock if index < config["num_layers"] else FluxSingleTransformerBlock
        return kind(
            dim=self.width(config),
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
        )

    def build_outer(self, config: dict) -> AnyModule:
        """diffusers' model without a block: embeddings and the final layer."""
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel.from_config(
            {**config, "num_layers": 0, "num_single_layers": 0}
        )

    def assemble(self, outer: AnyModule, config: dict, blocks: list[nn.Module]) -> nn.Module:
        """diffusers' model with these blocks; its forward is diffusers' own."""
        doubles = config["num_layers"]
        outer.transformer_blocks = nn.ModuleList(blocks[:doubles])
        outer.single_transformer_blocks = nn.ModuleList(blocks[doubles:])
        outer.register_to_config(num_layers=doubles, num_single_layers=len(blocks) - doubles)
        return outer

    def used_streams(self, config: dict, index: int) -> tuple[str, ...]:
        """The last block's text is never read."""
        return ("image",) if index == self.num_blocks(config) - 1 else ("image", "text")

    def embed(self, outer: AnyModule, inputs: Inputs) -> BlockState:
        """Everything that diffusers' forward does before its loops over blocks.

        The text is never masked: models of this kind were trained with padding as real tokens.
        """
        image = outer.x_embedder(inputs["hidden_states"])
        times = [inputs["timestep"].to(image.dtype) * 1000]
        if self.takes_guidance(outer.config):
            times.append(inputs["guidance"].to(image.dtype) * 1000)
        conditioning = outer.time_text_embed(*times, inputs["pooled_projections"])
        text = outer.context_embedder(inputs["encoder_hidden_states"])
        rotary = outer.pos_embed(torch.cat([self._text_ids(inputs), self._image_ids(inputs)]))
        return BlockState(image, text, conditioning, None, rotary)

    def run_block(self, block: AnyModule, state: BlockState) -> BlockState:
        shared: SharedText | None = getattr(block, "shared_text", None)
        if shared is not None:
            shared.value = state.modulated_text
        text, image = block(
            hidden_states=state.image,
            encoder_hidden_states=state.text,
            temb=state.conditioning,
            image_rotary_emb=state.extra,
        )
        state = state.with_streams(image, text)
        return state if shared is None else replace(state, modulated_text=shared.value)

    def site_kinds(self, config: dict, index: int) -> tuple[str, ...]:
        """A single block runs both streams as one: one FFN, and no text stream of its own."""
        return ("text", "ffn_image", "ffn_text") if index < config["num_layers"] else ("ffn_joint",)

    def project_ffn(self, block: AnyModule, kind: str, form: str) -> None:
        """paper: x + P(x) behind attention, modulation 6 d -> 3 d. gated: P between modulation and
        gate.

        ffn_joint (gated): P(x) replaces `proj_mlp` and the MLP's columns of `proj_out`.
        """
        if kind == "ffn_joint":
            width = block.proj_out.out_features
            block.proj_out = cut_linear(block.proj_out, width, width, AddedProjection)
            block.proj_mlp, block.act_mlp = linear_like(block.proj_mlp, width, width), nn.Identity()
            return
        suffix = SUFFIXES[kind.removeprefix("ffn_")]
        norm = getattr(block, f"norm1{suffix}")
        width = norm.linear.in_features
        setattr(block, f"ff{suffix}", linear_like(norm.linear, width, width))
        if form == "paper":
            norm.linear = cut_linear(norm.linear, width, 3 * width, PaddedLinear)
            setattr(block, f"norm2{suffix}", nn.Identity())

    def project_text(self, block: AnyModule, source: SharedText, steps: bool) -> None:
        """The text loses its modulation, norm and FFN; its q, k, v maps stay."""
        like = block.attn.add_q_proj
        width = like.in_features
        block.shared_text = source
        block.norm1_context = ProjectedNorm(linear_like(like, width, width), source, steps)
        block.norm2_context = nn.Identity()
        block.ff_context = linear_like(like, width, width) if steps else Nothing()
        block.attn.to_add_out = nn.Identity()

    def publish_text(self, block: AnyModule, source: SharedText) -> None:
        """Keeps the text that enters joint attention, for the text group behind this block."""
        publish(block, block.attn.add_q_proj, source)

    def observe(
        self, block: AnyModule, state: BlockState
    ) -> tuple[BlockState, dict[str, torch.Tensor]]:
        """Runs the block; returns also what its parts read and gave.

        A double block: `text_modulated`, and for each stream `<stream>_` + `before_ffn`,
        `ffn_input`, `ffn_output`, `after_ffn` (before a correction). A single block: the same four
        with `joint_`.
        """
        if hasattr(block, "proj_mlp"):
            return self._observe_single(block, state)
        inputs = {"attn.add_q_proj": "text_modulated"}
        inputs |= {f"norm2{suffix}": f"{stream}_before_ffn" for stream, suffix in SUFFIXES.items()}
        inputs |= {f"ff{suffix}": f"{stream}_ffn_input" for stream, suffix in SUFFIXES.items()}
        outputs = {f"ff{suffix}": f"{stream}_ffn_output" for stream, suffix in SUFFIXES.items()}
        with watched(block, inputs, outputs, ("text_after_ffn", "image_after_ffn")) as seen:
            return self.run_block(block, state), seen

    def _observe_single(
        self, block: AnyModule, state: BlockState
    ) -> tuple[BlockState, dict[str, torch.Tensor]]:
        """The FFN's output is what the FFN's columns of `proj_out` give; attention shares its
        gate."""
        inputs = {"proj_mlp": "joint_ffn_input", "proj_out": "joined"}
        with watched(block, inputs, {"norm": "modulated_and_gate"}, ("text", "image")) as seen:
            after = self.run_block(block, state)
        width = block.proj_out.out_features
        output = nn.functional.linear(
            seen.pop("joined")[..., width:], block.proj_out.weight[:, width:]
        )
        ends = torch.cat([seen.pop("text"), seen.pop("image")], dim=1)
        before = ends - seen.pop("modulated_and_gate")[1][:, None] * output
        return after, {
            **seen,
            "joint_ffn_output": output,
            "joint_before_ffn": before,
            "joint_after_ffn": ends,
        }

    def final_image(self, outer: AnyModule, state: BlockState) -> torch.Tensor:
        return state.image

    def finish(self, outer: AnyModule, state: BlockState) -> torch.Tensor:
        return outer.proj_out(outer.norm_out(state.image, state.conditioning))

    def takes_guidance(self, config: Mapping) -> bool:
        return bool(config.get("guidance_embeds"))

    def modulation_reads(self, config: dict) -> tuple[str, ...]:
        return (
            "the timestep",
            *(("guidance",) if self.takes_guidance(config) else ()),
            "pooled text",
        )

    def call(self, model: AnyModule, inputs: Inputs) -> torch.Tensor:
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

    def random_inputs(
        self, config: dict, samples: int, grid: tuple, text_tokens: int, device: str
    ) -> Inputs:
        """Standard normal inputs of this shape, for tests, timing and counting."""
        frames, rows, columns = grid
        inputs = {
            "hidden_states": torch.randn(
                samples, frames * rows * columns, config["in_channels"], device=device
            ),
            "encoder_hidden_states": torch.randn(
                samples, text_tokens, config["joint_attention_dim"], device=device
            ),
            "pooled_projections": torch.randn(
                samples, config["pooled_projection_dim"], device=device
            ),
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
            torch.cartesian_prod(
                torch.tensor([float(n)]), torch.arange(float(rows)), torch.arange(float(columns))
            )
            for n, (_, rows, columns) in enumerate(inputs["grid"].tolist())
        ]
        return torch.cat(ids).to(inputs["hidden_states"].device)
