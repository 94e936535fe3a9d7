"""Qwen-Image 2.1: blocks that run text and image as one sequence and share one modulation (method:
Qwen-Image 2.1's model card; diffusers' class).

Attention is causal in the text and full in the image, which comes last; text is modulated as if at
t = 0. So the text's states depend on neither the image nor the time. Condition images, which stand
inside the text, are not read here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import nn

from .base import REFERENCES, Architecture, BlockState, Inputs, Part
from .modules import AnyModule
from .names import NameTable, depth, tensors_of
from .packing import FlatLatents
from .projections import linear_like, opened, watched

BLOCKS = "transformer_blocks."
CAPTIONS = "encoder_hidden_states"
SLOT = 4  # tokens of the image for each place that the text encoder's sequence has for it
ROTARY_SHARES = (2, 7, 7)  # of 16: frame, row, column; 16, 56, 56 of 128 in the released model
TEXT_WIDTH, FFN_RATIO = 4096, 3  # where the released model's config.json does not say them
WEIGHT = {"weight": "weight"}
OUTER_MAPS = (
    "img_in",
    "modulation.{}",
    "norm_out.linear",
    "proj_out",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "txt_in.in_layer",
    "txt_in.out_layer",
    "txt_in.text_norm",
)
BLOCK_MAPS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.norm_q", "attn.norm_k")
FFN_MAPS = {  # ComfyUI also reads diffusers' two; its own files have them in one
    "img_mlp.gate_layer": ("img_mlp.gate_up", (0,), 2),
    "img_mlp.proj": ("img_mlp.gate_up", (1,), 2),
    "img_mlp.out": "img_mlp.out",
}
COMFYUI_NAMES = NameTable(
    tensors_of({name: name for name in OUTER_MAPS}, leaves=WEIGHT),
    tensors_of(
        {**{name: name for name in BLOCK_MAPS}, **FFN_MAPS},
        f"{BLOCKS}{{}}.",
        f"{BLOCKS}{{}}.",
        WEIGHT,
    ),
)


class QwenImage21(FlatLatents, Architecture):
    name = "qwen_image_21"
    diffusers_class = "QwenImage21Transformer2DModel"
    gguf_name = "qwen_image"  # ComfyUI-GGUF has no name for 2.1 and takes it by this one
    block_arguments = {"joint": "hidden_states"}
    block_returns = ("joint",)
    caption_inputs = (CAPTIONS, f"{CAPTIONS}_mask")
    timestep_modulations, marks = (), {}
    time_embedder = "time_text_embed"
    model_configs = {
        "qwen_image_21": {
            "patch_size": 1,
            "in_channels": 64,
            "out_channels": 64,
            "num_layers": 32,
            "attention_head_dim": 128,
            "num_attention_heads": 32,
            "context_in_dim": TEXT_WIDTH,
            "mlp_ratio": FFN_RATIO,
            "axes_dims_rope": [16, 56, 56],
        }
    }
    projection_names = {"ffn_joint": {"map": "img_mlp"}}
    comfyui_projections = projection_names
    replaced_names = {"ffn_joint": ("img_mlp.",)}
    cut_names = {}
    released = None
    tiny_config = {
        "patch_size": 1,
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 6,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "context_in_dim": 24,
        "mlp_ratio": 3,
        "axes_dims_rope": [4, 14, 14],
    }

    def detect(self, keys: Iterable[str]) -> bool:
        """Qwen-Image before it has a modulation in every block."""
        keys = set(keys)
        both = {"txt_in.text_norm.weight", "modulation.1.weight", f"{BLOCKS}0.attn.to_q.weight"}
        return both <= keys

    def infer_config(self, shapes: Callable[[str], tuple[int, ...]], keys: Iterable[str]) -> dict:
        """Configuration from shapes alone, for files without one (ComfyUI single files)."""
        width, in_channels = shapes("img_in.weight")
        head = shapes(f"{BLOCKS}0.attn.norm_q.weight")[0]
        return {
            "patch_size": 1,
            "in_channels": in_channels,
            "out_channels": shapes("proj_out.weight")[0],
            "num_layers": depth(keys, BLOCKS),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "context_in_dim": shapes("txt_in.text_norm.weight")[0],
            "mlp_ratio": shapes(f"{BLOCKS}0.img_mlp.proj.weight")[0] // width,
            "axes_dims_rope": [head * share // 16 for share in ROTARY_SHARES],
        }

    def num_blocks(self, config: dict) -> int:
        return config["num_layers"]

    def sections(self, config: dict) -> tuple[range, ...]:
        return (range(config["num_layers"]),)

    def with_blocks(self, config: dict, indices: Sequence[int]) -> dict:
        return {**config, "num_layers": len(indices)}

    def width(self, config: dict) -> int:
        return config["attention_head_dim"] * config["num_attention_heads"]

    def text_width(self, config: dict) -> int:
        return config.get("context_in_dim", TEXT_WIDTH)

    def attended_pairs(self, image: int, text: int) -> int:
        """The text reads itself alone, and its future behind a mask."""
        return text * text + image * (image + text)

    def block_prefix(self, config: dict, index: int) -> str:
        return f"{BLOCKS}{index}."

    def build_block(self, config: dict, index: int) -> nn.Module:
        from diffusers.models.transformers.transformer_qwenimage21 import (
            QwenImage21TransformerBlock,
        )

        return QwenImage21TransformerBlock(
            dim=self.width(config),
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
            mlp_ratio=config.get("mlp_ratio", FFN_RATIO),
            eps=config.get("eps", 1e-6),
        )

    def build_outer(self, config: dict) -> AnyModule:
        """diffusers' model without a block: embeddings, the modulation, the final layer."""
        from diffusers import QwenImage21Transformer2DModel

        return QwenImage21Transformer2DModel.from_config({**config, "num_layers": 0})

    def assemble(self, outer: AnyModule, config: dict, blocks: list[nn.Module]) -> nn.Module:
        """diffusers' model with these blocks; its forward is diffusers' own, which does not tell
        them where the image is."""
        none: AnyModule = SimpleNamespace(processor=None)
        for block in blocks:
            if not hasattr(block, "attn"):  # diffusers' forward asks every block what it attends by
                block.attn = none
        outer.transformer_blocks = nn.ModuleList(blocks)
        outer.register_to_config(num_layers=len(blocks))
        outer.register_forward_pre_hook(_tell_image_tokens, with_kwargs=True)
        return outer

    def used_streams(self, config: dict, index: int) -> tuple[str, ...]:
        """The last block's text is never read."""
        return ("image",) if index == self.num_blocks(config) - 1 else ("image", "text")

    def embed(self, outer: AnyModule, inputs: Inputs) -> BlockState:
        """Everything that diffusers' forward does before its loop over blocks."""
        image = outer.img_in(inputs["hidden_states"])
        given, mask = self._captions(inputs)
        text = outer.txt_in(given)
        timestep = inputs["timestep"].to(image.dtype)
        conditioning = outer.time_text_embed(
            torch.cat([timestep, timestep.new_zeros(1)]), image
        )  # [n + 1, d]: the text's t = 0 is the last
        tokens = text.shape[1] + image.shape[1]
        drawn = torch.arange(tokens, device=image.device) >= text.shape[1]
        keys = None
        if mask is not None:
            keys = torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1)
        return BlockState(
            image,
            text,
            conditioning,
            mask,
            {
                "modulation": outer.modulation(conditioning),
                "rotary_emb": self._rotary(outer, inputs, text.shape[1], image.device),
                "target_token_mask": drawn,
                "segments": [(0, text.shape[1], True)],
                "key_valid": keys,
            },
        )

    def run_block(self, block: AnyModule, state: BlockState) -> BlockState:
        tokens = state.text.shape[1]
        block.image_tokens = slice(-state.image.shape[1], None)
        joined = block(hidden_states=state.stream("joint"), **state.extra)
        return state.with_streams(joined[:, tokens:], joined[:, :tokens])

    def site_kinds(self, config: dict, index: int) -> tuple[str, ...]:
        """One FFN for both streams, and no text stream of its own."""
        return ("ffn_joint",)

    def project_ffn(self, block: AnyModule, kind: str, form: str) -> None:
        """paper: x + P(x) behind attention. gated: P between modulation and gate. Both save the
        same: the modulation is not the block's own."""
        like = block.img_mlp.proj
        block.img_mlp = linear_like(like, like.in_features, like.in_features)
        if form == "paper":
            block.img_norm2 = nn.Identity()
            block.register_forward_pre_hook(_open_gate, with_kwargs=True)

    def observe(
        self, block: AnyModule, state: BlockState
    ) -> tuple[BlockState, dict[str, torch.Tensor]]:
        """Runs the block; returns also what its FFN read and gave, all [n, tokens of both, d]:
        `joint_` + `before_ffn`, `ffn_input`, `ffn_output`, `after_ffn` (before a correction)."""
        inputs = {"img_norm2": "joint_before_ffn", "img_mlp": "joint_ffn_input"}
        outputs = {"img_mlp": "joint_ffn_output"}
        with watched(block, inputs, outputs, ("joint_after_ffn",)) as seen:
            return self.run_block(block, state), seen

    def final_image(self, outer: AnyModule, state: BlockState) -> torch.Tensor:
        return state.image

    def finish(self, outer: AnyModule, state: BlockState) -> torch.Tensor:
        drawn = torch.ones(state.image.shape[1], dtype=torch.bool, device=state.image.device)
        return outer.proj_out(outer.norm_out(state.image, state.conditioning, drawn))

    def takes_guidance(self, config: Mapping) -> bool:
        return False

    def modulation_reads(self, config: dict) -> tuple[str, ...]:
        return ("the timestep",)

    def call(self, model: AnyModule, inputs: Inputs) -> torch.Tensor:
        """diffusers' own forward on our inputs; returns the image's part."""
        text, mask = self._captions(inputs)
        tokens = inputs["hidden_states"].shape[1]
        slots = [False] * text.shape[1] + [True] * (tokens // SLOT)
        velocity = model(
            hidden_states=inputs["hidden_states"],
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            timestep=inputs["timestep"],
            img_shapes=[[_size(inputs)]] * len(text),
            img_mask=torch.tensor([slots] * len(text), device=text.device),
            return_dict=False,
        )[0]
        return velocity[:, -tokens:]

    def to_comfyui(self, key: str, keys: Collection[str] = ()) -> Part:
        return COMFYUI_NAMES.place(key)

    def from_comfyui(self, name: str) -> tuple[str, ...]:
        return COMFYUI_NAMES.contents(name)

    def random_inputs(
        self, config: dict, samples: int, grid: tuple, text_tokens: int, device: str
    ) -> Inputs:
        """Standard normal inputs of this shape, for tests, timing and counting."""
        frames, rows, columns = grid
        channels = config["in_channels"]
        text_shape = (samples, text_tokens, self.text_width(config))
        return {
            "hidden_states": torch.randn(samples, frames * rows * columns, channels, device=device),
            CAPTIONS: torch.randn(text_shape, device=device),
            f"{CAPTIONS}_mask": torch.ones(text_shape[:2], dtype=torch.bool, device=device),
            "timestep": torch.rand(samples, device=device),
            "grid": torch.tensor([grid]),
        }

    def _captions(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Captions and their mask, as long as the longest of them: the image's place in the
        sequence is behind the last token, so that padding would move it."""
        text, mask = inputs[CAPTIONS], inputs.get(f"{CAPTIONS}_mask")
        if mask is None:
            return text, None
        mask = mask.bool()
        longest = mask.shape[1] if mask.is_meta else int(mask.sum(1).max())
        return text[:, :longest], mask[:, :longest]

    def _rotary(
        self, outer: AnyModule, inputs: Inputs, text_tokens: int, device: torch.device
    ) -> torch.Tensor:
        """[tokens, half a head], complex"""
        size = _size(inputs)
        _, rows, columns = size
        is_image = torch.tensor([False] * text_tokens + [True] * (rows * columns), device="cpu")
        if device.type == "meta":  # diffusers counts places one by one
            half = outer.config.attention_head_dim // 2
            return torch.empty(len(is_image), half, dtype=torch.complex64, device=device)
        return outer.pos_embed([size], is_image.to(device), device=device)


def _size(inputs: Inputs) -> tuple[int, int, int]:
    """(frames, rows, columns) of the picture to draw. Raises ValueError for condition images."""
    if REFERENCES in inputs or len(inputs["grid"]) > 1:
        raise ValueError(
            "Qwen-Image 2.1 is pruned as a model that draws from text: condition images are not "
            "supported; leave the references out"
        )
    frames, rows, columns = inputs["grid"][0].tolist()
    return frames, rows, columns


def _tell_image_tokens(outer: AnyModule, arguments: tuple, named: dict) -> None:
    """Before each forward of the whole model; corrections read it."""
    frames, rows, columns = named["img_shapes"][0][-1]
    for block in outer.transformer_blocks:
        block.image_tokens = slice(-frames * rows * columns, None)


def _open_gate(block: AnyModule, arguments: tuple, named: dict) -> tuple[tuple, dict]:
    """The paper's form of an FFN projection reads the stream itself, and its gate is open."""
    whole = named["modulation"]
    attention = whole[..., : whole.shape[-1] // 2]
    return arguments, {**named, "modulation": opened(attention)}
