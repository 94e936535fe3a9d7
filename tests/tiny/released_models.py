"""Tiny random models in the layout of the authors' releases, and their forward written out by
hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ppcl_engine.system.tensor_files import write_tensors

TEACHER_BLOCKS = 8
INTERVALS = "1-2 5-6"
KEPT = [0, 1, 3, 4, 5, 7]  # the teacher's index of every block that stays
LISTS = {"single_stream_index": [1, 4, 5], "ehs_proj_index": [1, 5], "ffn_proj_index": [2, 5]}
TEXT = {"single_stream_index": [1, 4], "ehs_proj_index": [1, 4], "ffn_proj_index": []}
FFN = {"single_stream_index": [], "ehs_proj_index": [], "ffn_proj_index": [2, 5]}
WEIGHTS = "diffusion_pytorch_model"


def released_state(
    model: torch.nn.Module, kept: list[int], lists: dict[str, list[int]], seed: int = 0
) -> dict:
    """The tensors of a model that keeps these blocks of `model`; students and projections are
    random."""
    generator = torch.Generator().manual_seed(seed)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("transformer_blocks.")}
    width = model.inner_dim
    gaps = {kept[i] for i in range(len(kept) - 1) if kept[i + 1] > kept[i] + 1}

    def linear(name: str) -> dict[str, torch.Tensor]:
        weight = torch.randn(width, width, generator=generator) / width**0.5
        return {
            f"{name}.weight": 0.3 * weight,
            f"{name}.bias": 0.1 * torch.randn(width, generator=generator),
        }

    for new, old in enumerate(kept):
        prefix, start = f"transformer_blocks.{new}.", f"transformer_blocks.{old}."
        block = {
            n.removeprefix(start): t for n, t in model.state_dict().items() if n.startswith(start)
        }
        if old in gaps:
            block = {
                n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in block.items()
            }
        text, ffn = new in lists["single_stream_index"], new in lists["ffn_proj_index"]
        gone = (("txt_mod.", "txt_mlp.") if text else ()) + (
            ("img_mlp.", "txt_mlp.") if ffn else ()
        )
        block = {n: t for n, t in block.items() if not (gone and n.startswith(gone))}
        if ffn:
            block = {n: t[: 3 * width] if "_mod.1." in n else t for n, t in block.items()}
            block |= linear("img_ffn_proj") | ({} if text else linear("txt_ffn_proj"))
        if text:
            block |= linear("txt_proj") | (
                linear("ehs_proj") if new in lists["ehs_proj_index"] else {}
            )
        state |= {prefix + name: tensor for name, tensor in block.items()}
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def plant(state: dict) -> dict:
    """The exporter's fault: one group's text step in another group."""
    first, last = (f"transformer_blocks.{index}.ehs_proj." for index in (1, 5))
    return {
        n: state[first + n.removeprefix(last)].clone() if n.startswith(last) else t
        for n, t in state.items()
    }


def write_folder(
    folder: Path, state: dict, config: dict, lists: dict | None, kind: str = "safetensors"
) -> Path:
    """kind: "safetensors" or "bin", each also "sharded". `config` has as many layers as there are
    blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "X", **config, **(lists or {})}))
    ending = ".bin" if "bin" in kind else ".safetensors"
    save = torch.save if ending == ".bin" else lambda tensors, path: write_tensors(path, tensors)
    if "sharded" not in kind:
        save(state, folder / f"{WEIGHTS}{ending}")
        return folder
    names, weight_map = sorted(state), {}
    for shard in range(3):
        file = f"{WEIGHTS}-{shard + 1:05d}-of-00003{ending}"
        save({name: state[name] for name in names[shard::3]}, folder / file)
        weight_map |= {name: file for name in names[shard::3]}
    (folder / f"{WEIGHTS}{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def reference(
    model: torch.nn.Module, state: dict, lists: dict, inputs: dict, legacy: bool = False
) -> torch.Tensor:
    """What method.md says such a model computes. Of `model`, a plain one of the same depth, only
    embeddings, the final layer and joint attention run, with the released tensors in them."""
    model.load_state_dict(
        {n: t for n, t in state.items() if n in model.state_dict() and "_mod." not in n},
        strict=False,
    )
    image = model.img_in(inputs["hidden_states"])
    text = model.txt_in(model.txt_norm(inputs["encoder_hidden_states"]))
    conditioning = model.time_text_embed(inputs["timestep"], image)
    shapes = [[tuple(row) for row in inputs["grid"].tolist()]] * len(image)
    rotary = model.pos_embed(shapes, max_txt_seq_len=text.shape[1], device=image.device)
    streams = _Streams(image, text, None)
    for index, block in enumerate(model.transformer_blocks):
        parts = _Parts(state, index, lists)
        attend = partial(
            block.attn,
            encoder_hidden_states_mask=inputs["encoder_hidden_states_mask"],
            image_rotary_emb=rotary,
        )
        streams = _block(parts, streams, conditioning, attend, legacy)
    return model.proj_out(model.norm_out(streams.image, conditioning))


class _Streams(NamedTuple):
    image: torch.Tensor
    text: torch.Tensor
    source: torch.Tensor | None
    """modulated text of the last block that has its own, which projections read"""


class _Parts:
    """A block's maps in a released state, and which of them are projections."""

    def __init__(self, state: dict, index: int, lists: dict):
        self.state, self.prefix = state, f"transformer_blocks.{index}."
        self.text_pruned, self.ffn_pruned, self.steps_text = (
            index in lists[f"{name}_index"] for name in ("single_stream", "ffn_proj", "ehs_proj")
        )

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (self.state[f"{self.prefix}{name}.{part}"] for part in ("weight", "bias"))
        return F.linear(x, weight, bias)

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        inner = F.gelu(self.linear(f"{name}.net.0.proj", x), approximate="tanh")
        return self.linear(f"{name}.net.2", inner)

    def modulation(self, stream: str, conditioning: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shift, scale and gate of the attention and, where it is not projected, of the MLP."""
        chunks = 3 if self.ffn_pruned else 6
        return self.linear(f"{stream}_mod.1", F.silu(conditioning)).chunk(chunks, dim=-1)

    def feed_forward(self, stream: str, x: torch.Tensor, mod: tuple) -> torch.Tensor:
        if self.ffn_pruned:
            return x + self.linear(f"{stream}_ffn_proj", x)
        return x + mod[5][:, None] * self.mlp(f"{stream}_mlp", modulated(x, mod[3], mod[4]))


def _block(
    parts: _Parts, streams: _Streams, conditioning: torch.Tensor, attend: Callable, legacy: bool
) -> _Streams:
    image, text, source = streams
    image_mod = parts.modulation("img", conditioning)
    if parts.text_pruned:
        read = parts.linear("txt_proj", source) + (0 if legacy else source)
    else:
        text_mod = parts.modulation("txt", conditioning)
        read = source = modulated(text, text_mod[0], text_mod[1])
    image_attention, text_attention = attend(
        hidden_states=modulated(image, image_mod[0], image_mod[1]), encoder_hidden_states=read
    )
    image = parts.feed_forward("img", image + image_mod[2][:, None] * image_attention, image_mod)
    if not parts.text_pruned:
        text = parts.feed_forward("txt", text + text_mod[2][:, None] * text_attention, text_mod)
    elif parts.steps_text:
        text = text + parts.linear("ehs_proj", text)
    return _Streams(image, text, source)


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return normed(x) * (1 + scale[:, None]) + shift[:, None]


def normed(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
