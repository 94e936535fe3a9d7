"""Z-Image: blocks that run image and text as one sequence, behind refiner blocks that run each by
itself (method: Z-Image technical report; diffusers' class).

The refiners belong to the outer layers: the streams have not met there, so no interval of the joint
sequence could hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from .base import Architecture, BlockState, Inputs, Part
from .folded import first_half
from .modules import AnyModule
from .names import depth
from .packing import PackedLatents
from .projections import OpenGate, linear_like, watched
from .z_image_names import BLOCKS, COMFYUI_NAMES, PATCH, REFINERS

PATCH_SIZE, FRAMES = 2, 1
MULTIPLE = 32  # of the tokens of each stream
ROTARY_SHARES = (2, 3, 3)  # of 8: place in the text, row, column; 32, 48, 48 of 128 when released
CAPTIONS = "encoder_hidden_states"


class ZImage(PackedLatents, Architecture):
    name = "z_image"
    diffusers_class = "ZImageTransformer2DModel"
    gguf_name = "lumina2"
    block_arguments = {"joint": "x"}
    block_returns = ("joint",)
    caption_inputs = (CAPTIONS, f"{CAPTIONS}_mask")
    timestep_modulations, marks = (), {}
    unread = ("norm_final.weight",)  # Lumina 2's; in the file that ComfyUI's makers publish
    time_embedder = "t_embedder"
    model_configs = {
        "z_image": {
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
        }
    }
    projection_names = {"ffn_joint": {"map": "feed_forward"}}
    comfyui_projections = projection_names
    replaced_names = {"ffn_joint": ("feed_forward.", "ffn_norm2.")}
    cut_names = {("ffn_joint", "paper"): ("adaLN_modulation.",)}
    released = None
    tiny_config = {
        "in_channels": 4,
        "dim": 48,
        "n_layers": 6,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": 24,
        "axes_dims": [4, 6, 6],
        "axes_lens": [1536, 512, 512],
    }

    def detect(self, keys: Iterable[str]) -> bool:
        """Lumina 2, the same class in ComfyUI, has no learned padding."""
        keys = set(keys)
        both = {"cap_pad_token", "cap_embedder.1.weight"}
        diffusers = {f"all_x_embedder.{PATCH}.weight", f"{BLOCKS}0.attention.to_q.weight"}
        comfyui = {"x_embedder.weight", f"{BLOCKS}0.attention.qkv.weight"}
        return both <= keys and (diffusers <= keys or comfyui <= keys)

    def infer_config(self, shapes: Callable[[str], tuple[int, ...]], keys: Iterable[str]) -> dict:
        """Configuration from shapes alone, for files without one (ComfyUI single files)."""
        keys = list(keys)
        width, patch_channels = shapes(f"all_x_embedder.{PATCH}.weight")
        head = shapes(f"{BLOCKS}0.attention.norm_q.weight")[0]
        return {
            "in_channels": patch_channels // PATCH_SIZE**2,
            "dim": width,
            "n_layers": depth(keys, BLOCKS),
            "n_refiner_layers": depth(keys, REFINERS[0]),
            "n_heads": width // head,
            "n_kv_heads": width // head,
            "cap_feat_dim": shapes("cap_embedder.1.weight")[1],
            "axes_dims": [head * share // 8 for share in ROTARY_SHARES],
            "axes_lens": [1536, 512, 512],
        }

    def num_blocks(self, config: dict) -> int:
        return config["n_layers"]

    def sections(self, config: dict) -> tuple[range, ...]:
        return (range(config["n_layers"]),)

    def with_blocks(self, config: dict, indices: Sequence[int]) -> dict:
        return {**config, "n_layers": len(indices)}

    def width(self, config: dict) -> int:
        return config["dim"]

    def text_width(self, config: dict) -> int:
        return config["cap_feat_dim"]

    def token_channels(self, config: dict) -> int:
        return config["in_channels"] * PATCH_SIZE**2

    def filled_up(self, tokens: int) -> int:
        return tokens + -tokens % MULTIPLE

    def block_prefix(self, config: dict, index: int) -> str:
        return f"{BLOCKS}{index}."

    def build_block(self, config: dict, index: int) -> nn.Module:
        from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

        return ZImageTransformerBlock(
            layer_id=index,
            dim=config["dim"],
            n_heads=config["n_heads"],
            n_kv_heads=config["n_kv_heads"],
            norm_eps=config.get("norm_eps", 1e-5),
            qk_norm=config.get("qk_norm", True),
        )

    def build_outer(self, config: dict) -> AnyModule:
        """diffusers' model without a block: embeddings, refiners and the final layer."""
        from diffusers import ZImageTransformer2DModel

        return ZImageTransformer2DModel.from_config({**config, "n_layers": 0})

    def assemble(self, outer: AnyModule, config: dict, blocks: list[nn.Module]) -> nn.Module:
        """diffusers' model with these blocks; its forward is diffusers' own, which does not tell
        them where the image ends."""
        outer.layers = nn.ModuleList(blocks)
        outer.register_to_config(n_layers=len(blocks))
        outer.register_forward_pre_hook(_tell_image_tokens, with_kwargs=True)
        return outer

    def used_streams(self, config: dict, index: int) -> tuple[str, ...]:
        """The last block's text is never read."""
        return ("image",) if index == self.num_blocks(config) - 1 else ("image", "text")

    def embed(self, outer: AnyModule, inputs: Inputs) -> BlockState:
        """Everything that diffusers' forward does before its loop over blocks: each stream is
        filled up to a multiple of 32 tokens with a learned one, which counts as text in the text,
        and refined."""
        given = self._given(inputs)
        conditioning = outer.t_embedder(given["t"] * outer.t_scale).type_as(given["x"][0])
        image, text, _, image_ids, text_ids, image_pads, text_pads = outer.patchify_and_embed(
            given["x"], given["cap_feats"], PATCH_SIZE, FRAMES
        )
        image = _sequence(
            outer, outer.all_x_embedder[PATCH], image, image_ids, image_pads, outer.x_pad_token
        )
        for layer in outer.noise_refiner:
            image[0] = layer(image[0], None, image[1], conditioning)
        text = _sequence(outer, outer.cap_embedder, text, text_ids, text_pads, outer.cap_pad_token)
        for layer in outer.context_refiner:
            text[0] = layer(text[0], text[2], text[1])
        joined, rotary, mask, _ = outer._build_unified_sequence(
            *(image[0], image[1], image[3], None),
            *(text[0], text[1], text[3], None),
            *(None, None, None, None),
            omni_mode=False,
            device=text[0].device,
        )
        tokens = image[0].shape[1]
        return BlockState(
            joined[:, :tokens],
            joined[:, tokens:],
            conditioning,
            None if mask is None else mask[:, tokens:],
            (mask, rotary),
            padding=tokens - inputs["hidden_states"].shape[1],
            joint_order=("image", "text"),
        )

    def run_block(self, block: AnyModule, state: BlockState) -> BlockState:
        mask, rotary = state.extra
        tokens = state.image.shape[1]
        block.image_tokens = slice(tokens)
        joined = block(state.stream("joint"), mask, rotary, state.conditioning)
        return state.with_streams(joined[:, :tokens], joined[:, tokens:])

    def site_kinds(self, config: dict, index: int) -> tuple[str, ...]:
        """One FFN for both streams, and no text stream of its own."""
        return ("ffn_joint",)

    def project_ffn(self, block: AnyModule, kind: str, form: str) -> None:
        """paper: x + P(x) behind attention, modulation 4 d -> 2 d. gated: P between modulation and
        gate. Either way the norm behind the FFN goes too."""
        width = block.feed_forward.w1.in_features
        block.feed_forward = linear_like(block.feed_forward.w1, width, width)
        block.ffn_norm2 = nn.Identity()
        if form == "paper":
            block.ffn_norm1 = nn.Identity()
            block.adaLN_modulation = OpenGate(first_half(block.adaLN_modulation[0]))

    def observe(
        self, block: AnyModule, state: BlockState
    ) -> tuple[BlockState, dict[str, torch.Tensor]]:
        """Runs the block; returns also what its FFN read and gave, all [n, tokens of both, d]:
        `joint_` + `before_ffn`, `ffn_input`, `ffn_output` (behind its norm), `after_ffn` (before a
        correction)."""
        inputs = {"ffn_norm1": "joint_before_ffn", "feed_forward": "joint_ffn_input"}
        outputs = {"ffn_norm2": "joint_ffn_output"}
        with watched(block, inputs, outputs, ("joint_after_ffn",)) as seen:
            return self.run_block(block, state), seen

    def final_image(self, outer: AnyModule, state: BlockState) -> torch.Tensor:
        return state.image

    def finish(self, outer: AnyModule, state: BlockState) -> torch.Tensor:
        """diffusers' final layer orders a token's values row, column, channel; ours are channel,
        row, column. The model draws towards the picture, the velocity points away from it."""
        tokens = outer.all_final_layer[PATCH](state.image, c=state.conditioning)
        tokens = tokens[:, : tokens.shape[1] - state.padding]
        return -tokens.unflatten(-1, (PATCH_SIZE, PATCH_SIZE, -1)).movedim(-1, -3).flatten(-3)

    def takes_guidance(self, config: Mapping) -> bool:
        return False

    def modulation_reads(self, config: dict) -> tuple[str, ...]:
        return ("the timestep",)

    def call(self, model: AnyModule, inputs: Inputs) -> torch.Tensor:
        """diffusers' own forward on our inputs."""
        latents = model(**self._given(inputs), return_dict=False)[0]
        return -self.pack(torch.stack(latents).squeeze(2))

    def latent_shape(self, config: dict, height: int, width: int) -> tuple[int, int, int]:
        """Here `in_channels` counts a latent's channels, not a token's."""
        return super().latent_shape({"in_channels": self.token_channels(config)}, height, width)

    def to_comfyui(self, key: str, keys: Collection[str] = ()) -> Part:
        return COMFYUI_NAMES.place(key)

    def from_comfyui(self, name: str) -> tuple[str, ...]:
        return COMFYUI_NAMES.contents(name)

    def random_inputs(
        self, config: dict, samples: int, grid: tuple, text_tokens: int, device: str
    ) -> Inputs:
        """Standard normal inputs of this shape, for tests, timing and counting."""
        frames, rows, columns = grid
        channels = self.token_channels(config)
        text_shape = (samples, text_tokens, config["cap_feat_dim"])
        return {
            "hidden_states": torch.randn(samples, frames * rows * columns, channels, device=device),
            CAPTIONS: torch.randn(text_shape, device=device),
            f"{CAPTIONS}_mask": torch.ones(text_shape[:2], dtype=torch.bool, device=device),
            "timestep": torch.rand(samples, device=device),
            "grid": torch.tensor([grid]),
        }

    def _given(self, inputs: Inputs) -> dict:
        """What diffusers' forward reads: pictures and captions as lists, and a time that runs from
        noise (0) to the picture (1)."""
        pictures = self.unpack(inputs["hidden_states"], inputs["grid"]).unsqueeze(2)
        texts, mask = inputs[CAPTIONS].unbind(), inputs.get(f"{CAPTIONS}_mask")
        if mask is not None and not mask.is_meta:
            texts = [text[real] for text, real in zip(texts, mask.bool(), strict=True)]
        return {
            "x": list(pictures.unbind()),
            "t": 1 - inputs["timestep"],
            "cap_feats": list(texts),
        }


def _sequence(
    outer: AnyModule, embedder: AnyModule, rows: list, ids: list, pads: list, pad: torch.Tensor
) -> list:
    """[embedded rows [n, tokens, d], rotary table, mask of real tokens or None, tokens of each
    row], as diffusers makes them."""
    lengths = [len(row) for row in rows]
    embedded = list(embedder(torch.cat(rows)).split(lengths))
    return list(outer._prepare_sequence(embedded, ids, pads, pad, None, rows[0].device)[:4])


def _tell_image_tokens(outer: AnyModule, arguments: tuple, named: dict) -> None:
    """Before each forward of the whole model; corrections read it."""
    _, frames, rows, columns = (named.get("x") or arguments[0])[0].shape
    tokens = frames * (rows // PATCH_SIZE) * (columns // PATCH_SIZE)
    for layer in outer.layers:
        layer.image_tokens = slice(tokens + -tokens % MULTIPLE)
