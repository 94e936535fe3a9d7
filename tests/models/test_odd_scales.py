"""Scales that say nothing sensible, and formats that metadata names under other prefixes."""

from __future__ import annotations

import json

import pytest
import torch

from ppcl_engine.architectures import Part
from ppcl_engine.models.scales import Scale, scales_of
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

LAYER = "transformer_blocks.0.attn.to_q"
WHOLE = Part("a")


def opened(path, tensors, metadata=None, prefix=""):
    write_tensors(path, tensors, metadata or {})
    file = TensorFile(path)
    return {n.removeprefix(prefix): (file, n) for n in file.keys()}, file.metadata


def weight(kind=torch.float8_e4m3fn) -> torch.Tensor:
    return torch.ones(4, 4).to(kind)


@pytest.mark.parametrize("value", [-1.0, [1.0, 0.0, 1.0, 1.0], 0.0])
def test_a_scale_that_takes_weights_away_is_named(tmp_path, value):
    tensors = {f"{LAYER}.weight": weight(), f"{LAYER}.weight_scale": torch.tensor(value)}
    stored, metadata = opened(tmp_path / "a.safetensors", tensors)
    (scale,) = scales_of(stored, metadata, tmp_path).values()
    with pytest.raises(ValueError, match=r"a\.safetensors: .*to_q\.weight_scale"):
        scale.apply(weight(), WHOLE)


def test_a_scale_of_zero_belongs_to_zeros(tmp_path):
    values = torch.ones(4, 4)
    values[1] = 0
    write_tensors(tmp_path / "a.safetensors", {"scale": torch.tensor([1.0, 0.0, 2.0, 1.0])})
    applied = Scale(TensorFile(tmp_path / "a.safetensors"), "scale").apply(
        values.to(torch.float8_e4m3fn), WHOLE
    )
    assert applied[:, 0].tolist() == [1, 0, 2, 1]


@pytest.mark.parametrize(
    "before", ["", "diffusion_model.", "model.diffusion_model.", "transformer."]
)
@pytest.mark.parametrize(
    "about, said",
    [({"format": "int8_tensorwise", "convrot": True}, "int8"), ({"format": "int3"}, "int3")],
)
def test_formats_in_metadata_count_under_any_prefix(tmp_path, before, about, said):
    layers = json.dumps({"layers": {before + LAYER: about}})
    prefix = "model.diffusion_model."
    tensors = {f"{prefix}{LAYER}.weight": torch.ones(4, 4)}
    stored, metadata = opened(
        tmp_path / "a.safetensors", tensors, {"_quantization_metadata": layers}, prefix
    )
    with pytest.raises(ValueError, match=said):
        scales_of(stored, metadata, tmp_path)


@pytest.mark.parametrize(
    "about, said",
    [
        ({"format": ["float8_e4m3fn"]}, "is in the format"),
        ({"format": {}}, "is in the format"),
        ({"format": "float8_e4m3fn"}, "has no scale"),
    ],
)
def test_a_declared_format_that_cannot_be_read_is_one_line(tmp_path, about, said):
    text = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    tensors = {f"{LAYER}.weight": weight(), f"{LAYER}.comfy_quant": text}
    stored, metadata = opened(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=said) as error:
        scales_of(stored, metadata, tmp_path)
    assert "\n" not in str(error.value) and LAYER in str(error.value)
