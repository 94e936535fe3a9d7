"""Krea 2: blocks that run text and image as one sequence under one shared modulation, to which each
block adds a table of its own (method: diffusers' class).

A caption is the states of several layers of its text encoder. The small transformer that makes one
sequence of them belongs to the outer layers: it has seen no image, so it is never pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from .base import REFERENCES, Architecture, BlockState, Inputs, Part
from .krea2_names import BLOCKS, COMFYUI_NAMES, TEXT_BLOCKS
from .modules import AnyModule
from .names import depth
from .packing import PackedLatents
from .projections import watched

CAPTIONS = "encoder_hidden_states"
ROTARY_SHARES = (2, 3, 3)  # of 8: frame, row, column; 32, 48, 48 of 128 in the released model


class Krea2(PackedLatents, Architecture):
    name = "krea2"
    diffusers_class = "Krea2Transformer2DModel"
    # ComfyUI-GGUF has no name for it and refuses names that it does not know; which model a file
    # holds it asks the tensors
    gguf_name = "qwen_image"
    block_arguments = {"joint": "hidden_states"}
    block_returns = ("joint",)
    caption_inputs = (CAPTIONS, f"{CAPTIONS}_mask")
    timestep_modulations, marks = (), {}
    time_embedder = "time_embed"
    model_configs = {
        "krea2": {
            "in_channels": 64,
            "num_layers": 28,
            "attention_head_dim": 128,
            "num_attention_heads": 48,
            "num_key_value_heads": 12,
            "intermediate_size": 16384,
            "timestep_embed_dim": 256,
            "text_hidden_dim": 2560,
            "num_text_layers": 12,
            "text_num_attention_heads": 20,
            "text_num_key_value_heads": 20,
            "text_intermediate_size": 6912,
            "num_layerwise_text_blocks": 2,
            "num_refiner_text_blocks": 2,
            "axes_dims_rope": [32, 48, 48],
        }
    }
    projection_names = {"ffn_joint": {"map": "ff"}}
    comfyui_projections = {"ffn_joint": {"map": "mlp"}}
    replaced_names = {"ffn_joint": ("ff.",)}
    cut_names = {}
    released = None
    tiny_config = {
        "in_channels": 16,
        "num_layers": 6,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "timestep_embed_dim": 32,
        "text_hidden_dim": 8,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 128,
        "num_layerwise_text_blocks": 2,
        "num_refiner_text_blocks": 2,
        "axes_dims_rope": [4, 6, 6],
    }

    def detect(self, keys: Iterable[str]) -> bool:
        keys = set(keys)
        diffusers = {"text_fusion.projector.weight", f"{BLOCKS}0.attn.to_gate.weight"}
        comfyui = {"txtfusion.projector.weight", "blocks.0.attn.gate.weight"}
        return diffusers <= keys or comfyui <= keys

    def infer_config(self, shapes: Callable[[str], tuple[int, ...]], keys: Iterable[str]) -> dict:
        """Configuration from shapes alone, for files without one (ComfyUI single files)."""
        keys = list(keys)
        width, in_channels = shapes("img_in.weight")
        head, heads, key_heads = _heads(shapes, f"{BLOCKS}0.")
        _, text_heads, text_key_heads = _heads(shapes, f"{TEXT_BLOCKS[0]}0.")
        # in a pruned model some FFNs are projected; where all are, nothing reads their size
        ffns = [key for key in keys if key.startswith(BLOCKS) and key.endswith(".ff.gate.weight")]
        return {
            "in_channels": in_channels,
            "num_layers": depth(keys, BLOCKS),
            "attention_head_dim": head,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "intermediate_size": shapes(ffns[0])[0] if ffns else 0,
            "timestep_embed_dim": shapes("time_embed.linear_1.weight")[1],
            "text_hidden_dim": shapes("txt_in.linear_1.weight")[1],
            "num_text_layers": shapes("text_fusion.projector.weight")[1],
            "text_num_attention_heads": text_heads,
            "text_num_key_value_heads": text_key_heads,
            "text_intermediate_size": shapes(f"{TEXT_BLOCKS[0]}0.ff.gate.weight")[0],
            "num_layerwise_text_blocks": depth(keys, TEXT_BLOCKS[0]),
            "num_refiner_text_blocks": depth(keys, TEXT_BLOCKS[1]),
            "axes_dims_rope": [head * share // 8 for share in ROTARY_SHARES],
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
        """The layers of the text encoder side by side, as ComfyUI's conditioning has them."""
        return config["num_text_layers"] * config["text_hidden_dim"]

    def block_prefix(self, config: dict, index: int) -> str:
        return f"{BLOCKS}{index}."

    def build_block(self, config: dict, index: int) -> nn.Module:
        from .krea2_blocks import Krea2TransformerBlock, with_exact_norms

        block: AnyModule = Krea2TransformerBlock(
            hidden_size=self.width(config),
            intermediate_size=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            norm_eps=config.get("norm_eps", 1e-5),
        )
        block.attn.heads = block.attn.num_heads  # as diffusers' other attentions name them
        return with_exact_norms(block)

    def build_outer(self, config: dict) -> AnyModule:
        """diffusers' model without a block: embeddings, the text's blocks, the modulation, the
        final layer."""
        from diffusers import Krea2Transformer2DModel

        from .krea2_blocks import with_exact_norms

        outer: AnyModule = Krea2Transformer2DModel.from_config({**config, "num_layers": 0})
        return with_exact_norms(outer)

    def assemble(self, outer: AnyModule, config: dict, blocks: list[nn.Module]) -> nn.Module:
        """diffusers' model with these blocks; its forward is diffusers' own, which does not tell
        them where the image is."""
        outer.transformer_blocks = nn.ModuleList(blocks)
        outer.register_to_config(num_layers=len(blocks))
        outer.register_forward_pre_hook(_tell_image_tokens, with_kwargs=True)
        return outer

    def used_streams(self, config: dict, index: int) -> tuple[str, ...]:
        """The last block's text is never read."""
        return ("image",) if index == self.num_blocks(config) - 1 else ("image", "text")

    def embed(self, outer: AnyModule, inputs: Inputs) -> BlockState:
        """Everything that diffusers' forward does before its loop over blocks."""
        given = self._given(outer, inputs)
        time = outer.time_embed(given["timestep"], dtype=given["hidden_states"].dtype)
        modulation = outer.time_mod_proj(nn.functional.gelu(time, approximate="tanh"))
        mask, keys, text_keys = given["encoder_attention_mask"], None, None
        if mask is not None:
            text_keys = mask[:, None, None, :]
            real = mask.new_ones(given["hidden_states"].shape[:2])
            keys = torch.cat([mask, real], dim=1)[:, None, None, :]
        text = outer.txt_in(outer.text_fusion(given[CAPTIONS], attention_mask=text_keys))
        image = outer.img_in(given["hidden_states"])
        rotary = outer.rotary_emb(given["position_ids"])
        return BlockState(image, text, time[:, 0], mask, (modulation, rotary, keys))

    def run_block(self, block: AnyModule, state: BlockState) -> BlockState:
        tokens = state.text.shape[1]
        block.image_tokens = slice(-state.image.shape[1], None)
        joined = block(state.stream("joint"), *state.extra)
        return state.with_streams(joined[:, tokens:], joined[:, :tokens])

    def site_kinds(self, config: dict, index: int) -> tuple[str, ...]:
        """One FFN for both streams, and no text stream of its own."""
        return ("ffn_joint",)

    def project_ffn(self, block: AnyModule, kind: str, form: str) -> None:
        """paper: x + P(x) behind attention. gated: P between modulation and gate. Both save the
        same but for a norm: the modulation is not the block's own, and its table stays whole."""
        from .krea2_blocks import project

        project(block, form)

    def observe(
        self, block: AnyModule, state: BlockState
    ) -> tuple[BlockState, dict[str, torch.Tensor]]:
        """Runs the block; returns also what its FFN read and gave, all [n, tokens of both, d]:
        `joint_` + `before_ffn`, `ffn_input`, `ffn_output`, `after_ffn` (before a correction)."""
        inputs = {"norm2": "joint_before_ffn", "ff": "joint_ffn_input"}
        outputs = {"ff": "joint_ffn_output"}
        with watched(block, inputs, outputs, ("joint_after_ffn",)) as seen:
            return self.run_block(block, state), seen

    def final_image(self, outer: AnyModule, state: BlockState) -> torch.Tensor:
        return state.image

    def finish(self, outer: AnyModule, state: BlockState) -> torch.Tensor:
        return outer.final_layer(state.image, state.conditioning[:, None])

    def takes_guidance(self, config: Mapping) -> bool:
        return False

    def modulation_reads(self, config: dict) -> tuple[str, ...]:
        return ("the timestep",)

    def call(self, model: AnyModule, inputs: Inputs) -> torch.Tensor:
        """diffusers' own forward on our inputs."""
        return model(**self._given(model, inputs), return_dict=False)[0]

    def to_comfyui(self, key: str, keys: Collection[str] = ()) -> Part:
        return COMFYUI_NAMES.place(key)

    def from_comfyui(self, name: str) -> tuple[str, ...]:
        return COMFYUI_NAMES.contents(name)

    def random_inputs(
        self, config: dict, samples: int, grid: tuple, text_tokens: int, device: str
    ) -> Inputs:
        """Standard normal inputs of this shape, for tests, timing and counting."""
        frames, rows, columns = grid
        tokens, text_shape = frames * rows * columns, (samples, text_tokens)
        return {
            "hidden_states": torch.randn(samples, tokens, config["in_channels"], device=device),
            CAPTIONS: torch.randn(*text_shape, self.text_width(config), device=device),
            f"{CAPTIONS}_mask": torch.ones(text_shape, dtype=torch.bool, device=device),
            "timestep": torch.rand(samples, device=device),
            "grid": torch.tensor([grid]),
        }

    def _given(self, model: AnyModule, inputs: Inputs) -> dict:
        """What diffusers' forward reads: a text token's layers one by one, and the place of each
        token, which is 0 for all of the text."""
        image, text, mask = (inputs.get(name) for name in ("hidden_states", *self.caption_inputs))
        assert image is not None and text is not None
        layers = text.unflatten(-1, (model.config.num_text_layers, -1))
        places = torch.zeros(text.shape[1], 3)
        return {
            "hidden_states": image,
            CAPTIONS: layers,
            "timestep": inputs["timestep"],
            "position_ids": torch.cat([places, _places(inputs)]).to(image.device),
            "encoder_attention_mask": None if mask is None else mask.bool(),
        }


def _heads(shapes: Callable[[str], tuple[int, ...]], prefix: str) -> tuple[int, int, int]:
    """Sizes of a block: channels of a head, heads, heads of keys and values."""
    head = shapes(f"{prefix}attn.norm_q.weight")[0]
    heads, key_heads = (shapes(f"{prefix}attn.to_{name}.weight")[0] // head for name in "qk")
    return head, heads, key_heads


def _places(inputs: Inputs) -> torch.Tensor:
    """[image tokens, 3]: (frame, row, column), as diffusers' pipeline counts them. Raises
    ValueError for reference pictures."""
    if REFERENCES in inputs or len(inputs["grid"]) > 1:
        raise ValueError(
            "Krea 2 is pruned as a model that draws from text: reference pictures are not "
            "supported; leave them out"
        )
    _, rows, columns = inputs["grid"][0].tolist()
    places = torch.zeros(rows, columns, 3)
    places[..., 1] = torch.arange(rows)[:, None]
    places[..., 2] = torch.arange(columns)
    return places.flatten(0, 1)


def _tell_image_tokens(outer: AnyModule, arguments: tuple, named: dict) -> None:
    """Before each forward of the whole model; corrections read it."""
    for block in outer.transformer_blocks:
        block.image_tokens = slice(-named["hidden_states"].shape[1], None)
