"""Qwen-Image: dual-stream blocks, all alike (method: Qwen-Image technical report; diffusers'
class)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from .base import REFERENCES, Architecture, BlockState, Inputs, Part, ReleasedNames
from .folded import first_half, fold_block, fold_embedder, folding_of, unfolded_config
from .modules import AnyModule
from .packing import PackedLatents
from .projections import (
    FixedModulation,
    Nothing,
    PaddedModulation,
    ProjectedText,
    SharedText,
    linear_like,
    publish,
    watched,
)

STREAMS = {"image": "img", "text": "txt"}  # prefixes of the names of a block's parts
# a tensor in ComfyUI's files of edit models that modulate references at t = 0
REFERENCE_AT_ZERO = "__index_timestep_zero__"
ROTARY_SHARES = (2, 7, 7)  # of 16: frame, row, column; 16, 56, 56 of 128 in the released model


class QwenImage(PackedLatents, Architecture):
    name = "qwen_image"
    diffusers_class = "QwenImageTransformer2DModel"
    gguf_name = "qwen_image"
    block_arguments = {"image": "hidden_states", "text": "encoder_hidden_states"}
    block_returns = ("text", "image")
    caption_inputs = ("encoder_hidden_states", "encoder_hidden_states_mask")
    timestep_modulations = ("img_mod.1", "txt_mod.1")
    time_embedder = "time_text_embed"
    marks = {REFERENCE_AT_ZERO: "zero_cond_t"}
    model_configs = {
        "qwen_image": {
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": [16, 56, 56],
        }
    }
    projection_names = {
        "ffn_image": {"map": "img_mlp"},
        "ffn_text": {"map": "txt_mlp"},
        "text": {"map": "txt_norm1.projection", "step": "txt_mlp"},
    }
    comfyui_projections = projection_names
    replaced_names = {
        "ffn_image": ("img_mlp.",),
        "ffn_text": ("txt_mlp.",),
        "text": ("txt_mod.", "txt_mlp.", "attn.to_add_out."),
    }
    cut_names = {("ffn_image", "paper"): ("img_mod.",), ("ffn_text", "paper"): ("txt_mod.",)}
    released = ReleasedNames(
        lists={"text": "single_stream_index", "step": "ehs_proj_index", "ffn": "ffn_proj_index"},
        projections={
            "txt_proj": ("text", "map"),
            "ehs_proj": ("text", "step"),
            "img_ffn_proj": ("ffn_image", "map"),
            "txt_ffn_proj": ("ffn_text", "map"),
        },
        unused=("attn.to_add_out.",),
        intervals={
            "Qwen-Image-12B": (
                60,
                35,
                "3-4 5-7 8-10 11-12 15-24 25-27 29-30 42-43 45-47 48-49 52-53 54-55 56-57",
            ),
        },
    )
    tiny_config = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 6,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": [2, 6, 8],
    }

    def detect(self, keys: Iterable[str]) -> bool:
        """FLUX also has `transformer_blocks.0`; only Qwen-Image has a `txt_norm` and no
        `context_embedder`."""
        keys = set(keys)
        return {"txt_norm.weight", "img_in.weight", "transformer_blocks.0.img_mod.1.weight"} <= keys

    def infer_config(self, shapes: Callable[[str], tuple[int, ...]], keys: Iterable[str]) -> dict:
        """Configuration from shapes alone, for files without one (ComfyUI single files)."""
        width, in_channels = shapes("img_in.weight")
        head = shapes("transformer_blocks.0.attn.norm_q.weight")[0]
        depth = 1 + max(
            int(key.split(".")[1]) for key in keys if key.startswith("transformer_blocks.")
        )
        return {
            "patch_size": 2,
            "in_channels": in_channels,
            "out_channels": shapes("proj_out.weight")[0] // 4,
            "num_layers": depth,
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes("txt_norm.weight")[0],
            "axes_dims_rope": [head * share // 16 for share in ROTARY_SHARES],
            **({"zero_cond_t": True} if REFERENCE_AT_ZERO in keys else {}),
        }

    def num_blocks(self, config: dict) -> int:
        return config["num_layers"]

    def sections(self, config: dict) -> tuple[range, ...]:
        return (range(config["num_layers"]),)

    def with_blocks(self, config: dict, indices: Sequence[int]) -> dict:
        return {**config, "num_layers": len(indices)}

    def width(self, config: dict) -> int:
        return config["attention_head_dim"] * config["num_attention_heads"]

    def block_prefix(self, config: dict, index: int) -> str:
        return f"transformer_blocks.{index}."

    def build_block(self, config: dict, index: int) -> nn.Module:
        from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

        block = QwenImageTransformerBlock(
            dim=self.width(config),
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
            zero_cond_t=config.get("zero_cond_t", False),
        )
        folding = folding_of(config)
        return (
            fold_block(block, self.timestep_modulations, self.width(config), folding)
            if folding
            else block
        )

    def build_outer(self, config: dict) -> AnyModule:
        """diffusers' model without a block: embeddings and the final layer."""
        from diffusers import QwenImageTransformer2DModel

        outer: AnyModule = QwenImageTransformer2DModel.from_config(
            {**unfolded_config(config), "num_layers": 0}
        )
        if folding := folding_of(config):
            fold_embedder(outer.time_text_embed, outer.norm_out, self.width(config), folding)
        return outer

    def assemble(self, outer: AnyModule, config: dict, blocks: list[nn.Module]) -> nn.Module:
        """diffusers' model with these blocks; its forward is diffusers' own."""
        outer.transformer_blocks = nn.ModuleList(blocks)
        outer.register_to_config(num_layers=len(blocks))
        return outer

    def modulation_reads(self, config: dict) -> tuple[str, ...]:
        """Layered models also read a condition of their own, and guidance-distilled ones their
        guidance."""
        more = {"guidance_embeds": "guidance", "use_additional_t_cond": "an additional condition"}
        return ("the timestep", *(what for name, what in more.items() if config.get(name)))

    def reference_timesteps(self, config: dict) -> tuple[float, ...]:
        return (0.0,) if config.get("zero_cond_t") else ()

    def time_conditioning(
        self, embedder: AnyModule, timestep: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        return embedder(timestep, timestep.new_empty(0, dtype=dtype))

    def used_streams(self, config: dict, index: int) -> tuple[str, ...]:
        """The last block's text is never read."""
        return ("image",) if index == self.num_blocks(config) - 1 else ("image", "text")

    def embed(self, outer: AnyModule, inputs: Inputs) -> BlockState:
        """Everything that diffusers' forward does before its loop over blocks. References come
        behind the tokens to draw."""
        tokens = self._tokens(inputs)
        image = outer.img_in(tokens)
        text = outer.txt_in(outer.txt_norm(inputs["encoder_hidden_states"]))
        timestep, modulate_index = inputs["timestep"].to(image.dtype), None
        if outer.zero_cond_t:  # edit models modulate the reference's tokens as if at t = 0
            timestep = torch.cat([timestep, timestep * 0])
            modulate_index = self._modulate_index(inputs)
        conditioning = outer.time_text_embed(timestep, image)
        rotary = outer.pos_embed(
            self._image_shapes(inputs), max_txt_seq_len=text.shape[1], device=image.device
        )
        mask = inputs.get("encoder_hidden_states_mask")
        return BlockState(
            image,
            text,
            conditioning,
            None if mask is None else mask.bool(),
            (rotary, modulate_index),
            target_tokens=inputs["hidden_states"].shape[1],
        )

    def run_block(self, block: AnyModule, state: BlockState) -> BlockState:
        rotary, modulate_index = state.extra
        shared: SharedText | None = getattr(block, "shared_text", None)
        if shared is not None:
            shared.value = state.modulated_text
        text, image = block(
            hidden_states=state.image,
            encoder_hidden_states=state.text,
            encoder_hidden_states_mask=state.text_mask,
            temb=state.conditioning,
            image_rotary_emb=rotary,
            modulate_index=modulate_index,
        )
        state = state.with_streams(image, text)
        return state if shared is None else replace(state, modulated_text=shared.value)

    def site_kinds(self, config: dict, index: int) -> tuple[str, ...]:
        return ("text", "ffn_image", "ffn_text")

    def project_ffn(self, block: AnyModule, kind: str, form: str) -> None:
        """paper: x + P(x) behind attention, modulation 6 d -> 3 d. gated: P between modulation and
        gate."""
        stream = STREAMS[kind.removeprefix("ffn_")]
        modulation = getattr(block, f"{stream}_mod")
        width = modulation[1].out_features // 6
        setattr(block, f"{stream}_mlp", linear_like(modulation[1], width, width))
        if form == "paper":
            setattr(
                block, f"{stream}_mod", PaddedModulation(modulation[0], first_half(modulation[1]))
            )
            setattr(block, f"{stream}_norm2", nn.Identity())

    def project_text(self, block: AnyModule, source: SharedText, steps: bool) -> None:
        """The text loses its modulation, norm and MLP; its q, k, v maps stay."""
        like = block.attn.add_q_proj
        width = like.in_features
        block.shared_text = source
        block.txt_mod = FixedModulation(width, steps)
        block.txt_norm1 = ProjectedText(linear_like(like, width, width), source)
        block.txt_norm2 = nn.Identity()
        block.txt_mlp = linear_like(like, width, width) if steps else Nothing()
        block.attn.to_add_out = nn.Identity()

    def publish_text(self, block: AnyModule, source: SharedText) -> None:
        """Keeps the text that enters joint attention, for the text group behind this block."""
        publish(block, block.attn.add_q_proj, source)

    def observe(
        self, block: AnyModule, state: BlockState
    ) -> tuple[BlockState, dict[str, torch.Tensor]]:
        """Runs the block; returns also what its parts read and gave, all [n, tokens, d].

        `text_modulated`, and for each stream `<stream>_` + `before_ffn`, `ffn_input`, `ffn_output`,
        `after_ffn` (before a correction).
        """
        inputs = {"attn.add_q_proj": "text_modulated"}
        inputs |= {f"{short}_norm2": f"{stream}_before_ffn" for stream, short in STREAMS.items()}
        inputs |= {f"{short}_mlp": f"{stream}_ffn_input" for stream, short in STREAMS.items()}
        outputs = {f"{short}_mlp": f"{stream}_ffn_output" for stream, short in STREAMS.items()}
        with watched(block, inputs, outputs, ("text_after_ffn", "image_after_ffn")) as seen:
            return self.run_block(block, state), seen

    def final_image(self, outer: AnyModule, state: BlockState) -> torch.Tensor:
        return state.image

    def finish(self, outer: AnyModule, state: BlockState) -> torch.Tensor:
        """The velocity of the picture to draw, without its references."""
        conditioning = state.conditioning.chunk(2)[0] if outer.zero_cond_t else state.conditioning
        return outer.proj_out(outer.norm_out(state.image, conditioning))[:, : state.target_tokens]

    def takes_guidance(self, config: Mapping) -> bool:
        return False

    def call(self, model: AnyModule, inputs: Inputs) -> torch.Tensor:
        """diffusers' own forward on our inputs; returns the part that belongs to the picture to
        draw."""
        velocity = model(
            hidden_states=self._tokens(inputs),
            encoder_hidden_states=inputs["encoder_hidden_states"],
            encoder_hidden_states_mask=inputs.get("encoder_hidden_states_mask"),
            timestep=inputs["timestep"],
            img_shapes=self._image_shapes(inputs),
            return_dict=False,
        )[0]
        return velocity[:, : inputs["hidden_states"].shape[1]]

    def to_comfyui(self, key: str, keys: Collection[str] = ()) -> Part:
        return Part(key)  # ComfyUI kept diffusers' names for Qwen-Image

    def from_comfyui(self, name: str) -> tuple[str, ...]:
        return (name,)

    def random_inputs(
        self, config: dict, samples: int, grid: tuple, text_tokens: int, device: str
    ) -> Inputs:
        """Standard normal inputs of this shape, for tests, timing and counting."""
        frames, rows, columns = grid
        text_shape = (samples, text_tokens, config["joint_attention_dim"])
        return {
            "hidden_states": torch.randn(
                samples, frames * rows * columns, config["in_channels"], device=device
            ),
            "encoder_hidden_states": torch.randn(text_shape, device=device),
            "encoder_hidden_states_mask": torch.ones(
                text_shape[:2], dtype=torch.bool, device=device
            ),
            "timestep": torch.rand(samples, device=device),
            "grid": torch.tensor([grid]),
        }

    def _tokens(self, inputs: Inputs) -> torch.Tensor:
        """[n, tokens of all pictures, channels]. Raises ValueError for pictures of another size
        than `grid` says."""
        pictures = [inputs[name] for name in ("hidden_states", REFERENCES) if name in inputs]
        first, *others = inputs["grid"].prod(1).tolist()
        given = [tokens.shape[1] for tokens in pictures]
        if given != ([first, sum(others)] if others else [first]):
            sizes = ", ".join(f"{rows} x {columns}" for _, rows, columns in inputs["grid"].tolist())
            raise ValueError(
                f"the picture and its references have {' + '.join(map(str, given))} tokens, their sizes are {sizes}; "
                "calibrate again, with references of a whole number of tokens"
            )
        return torch.cat(pictures, dim=1)

    def _image_shapes(self, inputs: Inputs) -> list:
        shapes = [tuple(row) for row in inputs["grid"].tolist()]
        return [shapes] * len(inputs["timestep"])

    def _modulate_index(self, inputs: Inputs) -> torch.Tensor:
        sizes = [frames * rows * columns for frames, rows, columns in inputs["grid"].tolist()]
        row = torch.tensor([0] * sizes[0] + [1] * sum(sizes[1:]), dtype=torch.int)
        return row.to(inputs["hidden_states"].device).expand(len(inputs["timestep"]), -1)
