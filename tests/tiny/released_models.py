"""Tiny random models in the layout of the authors' releases, and their forward written out by
hand."""

from __future__ import annotations

import json
from pathlib import Path

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
    source = None
    for index, block in enumerate(model.transformer_blocks):

        def linear(name: str, x: torch.Tensor, index: int = index) -> torch.Tensor:
            prefix = f"transformer_blocks.{index}.{name}"
            return F.linear(x, state[f"{prefix}.weight"], state[f"{prefix}.bias"])

        def mlp(name: str, x: torch.Tensor, linear=linear) -> torch.Tensor:
            return linear(
                f"{name}.net.2", F.gelu(linear(f"{name}.net.0.proj", x), approximate="tanh")
            )

        text_pruned, ffn_pruned = (
            index in lists[f"{name}_index"] for name in ("single_stream", "ffn_proj")
        )
        image_mod = linear("img_mod.1", F.silu(conditioning)).chunk(3 if ffn_pruned else 6, dim=-1)
        image_modulated = normed(image) * (1 + image_mod[1][:, None]) + image_mod[0][:, None]
        if text_pruned:
            text_modulated = linear("txt_proj", source) + (0 if legacy else source)
        else:
            text_mod = linear("txt_mod.1", F.silu(conditioning)).chunk(
                3 if ffn_pruned else 6, dim=-1
            )
            text_modulated = source = (
                normed(text) * (1 + text_mod[1][:, None]) + text_mod[0][:, None]
            )
        image_attention, text_attention = block.attn(
            hidden_states=image_modulated,
            encoder_hidden_states=text_modulated,
            encoder_hidden_states_mask=inputs["encoder_hidden_states_mask"],
            image_rotary_emb=rotary,
        )
        image = image + image_mod[2][:, None] * image_attention
        if ffn_pruned:
            image = image + linear("img_ffn_proj", image)
        else:
            inner = normed(image) * (1 + image_mod[4][:, None]) + image_mod[3][:, None]
            image = image + image_mod[5][:, None] * mlp("img_mlp", inner)
        if text_pruned:
            if index in lists["ehs_proj_index"]:
                text = text + linear("ehs_proj", text)
            continue
        text = text + text_mod[2][:, None] * text_attention
        if ffn_pruned:
            text = text + linear("txt_ffn_proj", text)
        else:
            inner = normed(text) * (1 + text_mod[4][:, None]) + text_mod[3][:, None]
            text = text + text_mod[5][:, None] * mlp("txt_mlp", inner)
    return model.proj_out(model.norm_out(image, conditioning))


def normed(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
