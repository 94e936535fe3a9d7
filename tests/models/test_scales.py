"""Scales of quantised weights: each shape means one thing, parts of joined maps get their own rows,
the rest is refused."""

from __future__ import annotations

import json

import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.declared_formats import FORMAT_SUFFIX
from ppcl_engine.models.folding.reading import open_original
from ppcl_engine.models.weights import Weights
from ppcl_engine.system.tensor_files import write_tensors

from ..tiny.models import comfyui_state, tiny_model

QWEN, FLUX = architecture_named("qwen_image"), architecture_named("flux1")
HEAD_32 = {"attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]}
SHAPES = {
    "a number": lambda rows: (),
    "one": lambda rows: (1,),
    "one by one": lambda rows: (1, 1),
    "a row each": lambda rows: (rows,),
    "a row each, standing": lambda rows: (rows, 1),
    "blocks of columns": lambda rows: (rows, 4, 1),
}


def quantised(
    weight: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(stored, scale) of a matrix, each group to the largest number of the type"""
    most = 127 if dtype is torch.int8 else torch.finfo(dtype).max
    groups = {
        0: (1, 1),
        1: (shape[0], 1) if shape else (1, 1),
        2: (shape[0], 1) if shape else (1, 1),
    }
    rows, blocks = (shape[0], shape[1]) if len(shape) == 3 else groups[len(shape)]
    parts = weight.reshape(rows, blocks, -1) if rows == len(weight) else weight.reshape(1, 1, -1)
    scale = parts.abs().amax(-1, keepdim=True) / most
    values = parts / scale
    stored = (values.round() if dtype is torch.int8 else values).to(dtype)
    return stored.reshape(weight.shape), scale.reshape(shape)


def stored_model(architecture, model, shape, dtype, suffix=".weight_scale"):
    """(tensors of a ComfyUI file, what the same tensors are worth)"""
    stored, worth = {}, {}
    for name, tensor in comfyui_state(architecture, model).items():
        stored[name] = worth[name] = tensor
        if tensor.ndim == 2 and name.endswith(".weight") and "blocks." in name:
            values, scale = quantised(tensor, shape(len(tensor)), dtype)
            stored[name], stored[name.removesuffix(".weight") + suffix] = values, scale
            groups = (
                scale.reshape(len(scale), -1, 1) if scale.numel() > 1 else scale.reshape(1, 1, 1)
            )
            cut = values.float().reshape(len(tensor), groups.shape[1], -1) * groups
            worth[name] = cut.reshape(tensor.shape)
    return stored, worth


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("architecture", [QWEN, FLUX], ids=["square maps", "joined maps"])
def test_a_scale_means_what_its_shape_says(tmp_path, architecture, shape, dtype):
    model = (
        tiny_model(architecture, **HEAD_32) if architecture is QWEN else tiny_model(architecture)
    )
    stored, worth = stored_model(architecture, model, shape, dtype)
    write_tensors(tmp_path / "a.safetensors", stored)
    write_tensors(tmp_path / "plain.safetensors", worth)
    weights, plain = Weights(tmp_path / "a.safetensors"), Weights(tmp_path / "plain.safetensors")
    for key in plain.keys():
        assert torch.equal(weights.read(key, torch.float32), plain.read(key)), key
    assert (
        max(float((plain.read(k) - model.state_dict()[k]).abs().max()) for k in plain.keys()) < 0.1
    )


NAME = "transformer_blocks.1.attn.to_q"


@pytest.fixture(scope="module")
def int8():
    return stored_model(QWEN, tiny_model(QWEN, **HEAD_32), lambda rows: (rows, 1), torch.int8)[0]


def about(**values) -> torch.Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


REFUSED = {
    "groups that do not divide": (
        {
            FORMAT_SUFFIX: about(
                format="int8_tensorwise", params={"convrot": 1, "convrot_groupsize": 256}
            )
        },
        "rotated in groups of 256, which do not divide its 64",
    ),
    "groups that are no number": (
        {FORMAT_SUFFIX: about(format="int8_tensorwise", convrot=True, convrot_groupsize="64")},
        "rotated in groups of 64, which do not divide its 64",
    ),
    "said to be NVFP4": (
        {FORMAT_SUFFIX: about(format="nvfp4")},
        "is declared as nvfp4, but stored as another type",
    ),
    "said to be MXFP8": (
        {FORMAT_SUFFIX: about(format="mxfp8")},
        "is declared as mxfp8, but stored",
    ),
    "NVFP4 with one of its scales": (
        {FORMAT_SUFFIX: about(format="nvfp4"), ".weight": torch.ones(64, 32, dtype=torch.uint8)},
        r"is nvfp4 and has no scale \(.weight_scale_2\)",
    ),
    "another format": (
        {FORMAT_SUFFIX: about(format="int3")},
        "is in the format 'int3', which is not read",
    ),
    "no format": ({FORMAT_SUFFIX: about(kind=3)}, "is in the format 'None'"),
    "rubbish": ({FORMAT_SUFFIX: torch.ones(9, dtype=torch.uint8)}, "comfy_quant: not JSON"),
    "said to be fp8": (
        {FORMAT_SUFFIX: about(format="float8_e4m3fn")},
        "is declared as float8_e4m3fn, but stored as another type",
    ),
    "two levels of scales": ({".weight_scale_2": torch.ones(())}, "belongs to NVFP4, which"),
    "smoothed": ({".pre_quant_scale": torch.ones(96)}, "belongs to NVFP4, which"),
    "W4A8": ({".weight_s_rel": torch.ones(3)}, "belongs to W4A8"),
    "bitsandbytes": ({".weight.absmax": torch.ones(3)}, "belongs to bitsandbytes in 4 bits"),
    "nf4": (
        {".weight.quant_state.bitsandbytes__nf4": torch.ones(3)},
        "belongs to bitsandbytes NF4",
    ),
    "Nunchaku": ({".wscales": torch.ones(3)}, r"belongs to Nunchaku \(SVDQuant\)"),
    "no scale": ({".weight_scale": None}, "is int8 and has no scale"),
    "an empty scale": ({".weight_scale": torch.ones(0)}, r"weight_scale \(0,\) is not a scale of"),
    "a scale a column": (
        {".weight_scale": torch.ones(1, 64)},
        r"weight_scale \(1, 64\) is not a scale of",
    ),
    "blocks that do not divide": (
        {".weight_scale": torch.ones(64, 5, 1)},
        r"\(64, 5, 1\) is not a scale of",
    ),
    "a scale in whole numbers": (
        {".weight_scale": torch.ones(64, dtype=torch.int32)},
        "is not a scale of",
    ),
    "two scales": ({".scale_weight": torch.ones(())}, "has two scales"),
    "a scale of nothing": ({".more.weight_scale": torch.ones(())}, "is a scale, but there is no"),
    "a scale of a plain weight": (
        {".weight": torch.ones(64, 64)},
        "has a scale, but is torch.float32",
    ),
}


@pytest.mark.parametrize("change, reason", REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_named(tmp_path, int8, change, reason):
    tensors = {**int8, **{NAME + ending: tensor for ending, tensor in change.items()}}
    write_tensors(
        tmp_path / "a.safetensors", {name: t for name, t in tensors.items() if t is not None}
    )
    with pytest.raises(ValueError, match=f"a.safetensors: {NAME}.*{reason}") as caught:
        Weights(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value) and "the model does not have" not in str(caught.value)


def test_formats_in_the_metadata_count_too(tmp_path, int8):
    for name, about_it in (
        (NAME, {"format": "int3"}),
        ("elsewhere", {"format": "nvfp4"}),
    ):
        text = json.dumps({"layers": {name: about_it}})
        write_tensors(tmp_path / f"{name}.safetensors", int8, {"_quantization_metadata": text})
    with pytest.raises(ValueError, match="in the format 'int3'"):
        Weights(tmp_path / f"{NAME}.safetensors")
    assert Weights(tmp_path / "elsewhere.safetensors").is_scaled(f"{NAME}.weight")
    write_tensors(tmp_path / "a.safetensors", int8, {"_quantization_metadata": '{"layers": [1]}'})
    with pytest.raises(ValueError, match="its layers are not JSON objects"):
        Weights(tmp_path / "a.safetensors")


def test_a_prefix_changes_nothing_about_scales(tmp_path, int8):
    write_tensors(
        tmp_path / "a.safetensors", {f"model.diffusion_model.{name}": t for name, t in int8.items()}
    )
    write_tensors(tmp_path / "b.safetensors", int8)
    weights, plain = Weights(tmp_path / "a.safetensors"), Weights(tmp_path / "b.safetensors")
    assert torch.equal(weights.read(f"{NAME}.weight"), plain.read(f"{NAME}.weight"))
    assert weights.read(f"{NAME}.weight").dtype is torch.bfloat16
    assert open_original(tmp_path / "a.safetensors").prefix == "model.diffusion_model."
