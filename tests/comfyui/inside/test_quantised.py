"""Models in the formats of few bits that people have: what this host reads is read right, as a bundle's base, whole pruned
files and standalones, in our loader and in the host's; what it does not read is one line that names the format. What is
right: the same model with the numbers that such a file stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import comfy.quant_ops
import comfy.utils
import pytest
import torch

from ppcl_engine.files import TensorFile, write_tensors

from .conftest import relative_error

EXACT, NEAR, ROUNDED = 1e-5, 1e-2, 0.1  # the same numbers; some of them in 16 bits; students in fp8 too
INPUTS = {"int8_tensorwise": 0.05, "convrot_w4a4": 0.5}  # what a model changes where the host rounds inputs too
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
KNOWN = comfy.quant_ops.QUANT_ALGOS
EVERY = 64  # what both sizes of a matrix are multiples of, in all these formats
FULL = {"full_precision_matrix_mult": True}
Parts = dict[str, torch.Tensor]


def in_float8(weight: torch.Tensor, dtype=torch.float8_e4m3fn) -> tuple[Parts, torch.Tensor]:
    scale = weight.abs().max() / LARGEST[dtype]
    values = (weight / scale).to(dtype)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def in_int8(weight: torch.Tensor, by_row: bool) -> tuple[Parts, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()) / 127
    values = (weight / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def by_the_host(weight: torch.Tensor, name: str, **options) -> tuple[Parts, torch.Tensor]:
    layout = KNOWN[name]["comfy_tensor_layout"]
    found = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **options)
    return found.state_dict("weight"), found.dequantize()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """name: the host's; make: weight -> (its parts in a file, the numbers that they stand for); said: the rest of what the
    file says of it. old: scaled fp8, all of it. in_metadata: where the file says it."""

    name: str
    make: Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
    said: dict | None = None
    old: torch.dtype | None = None
    in_metadata: bool = False

    @property
    def is_read(self) -> bool:
        return self.old is not None or self.name in KNOWN

    def far(self, least: float) -> float:
        """How far a model may be from its numbers in full precision. ComfyUI 0.3.75 keeps scaled fp8 models' biases in fp8."""
        return max(
            least,
            INPUTS.get(self.name, 0),
            ROUNDED if self.old and not hasattr(comfy.utils, "convert_old_quants") else 0,
        )


FP8, FP8_WIDE = torch.float8_e4m3fn, torch.float8_e5m2
ROTATED = {"convrot": True, "convrot_groupsize": EVERY}
KINDS = {
    "scaled fp8": Kind(name="float8_e4m3fn", make=in_float8, old=FP8),
    "scaled fp8, e5m2": Kind(name="float8_e5m2", make=lambda w: in_float8(w, FP8_WIDE), old=FP8_WIDE),
    "float8_e4m3fn": Kind(name="float8_e4m3fn", make=in_float8),
    "float8_e4m3fn in metadata": Kind(name="float8_e4m3fn", make=in_float8, in_metadata=True),
    "float8_e5m2": Kind(name="float8_e5m2", make=lambda w: in_float8(w, FP8_WIDE)),
    "int8": Kind(name="int8_tensorwise", make=lambda w: in_int8(w, False)),
    "int8 by row": Kind(name="int8_tensorwise", make=lambda w: in_int8(w, True)),
    "int8 convrot": Kind(
        name="int8_tensorwise",
        make=lambda w: by_the_host(w, "int8_tensorwise", per_channel=True, **ROTATED),
        said=ROTATED,
    ),
    "mxfp8": Kind(name="mxfp8", make=lambda w: by_the_host(w, "mxfp8")),
    "nvfp4": Kind(name="nvfp4", make=lambda w: by_the_host(w, "nvfp4")),
    "convrot_w4a4": Kind(
        name="convrot_w4a4",
        make=lambda w: by_the_host(w, "convrot_w4a4", convrot_groupsize=EVERY),
        said={"convrot_groupsize": EVERY},
    ),
}
READ = [name for name, kind in KINDS.items() if kind.is_read]
REFUSED = {name: kind for name, kind in KINDS.items() if not kind.is_read}


def as_json(value: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def stored(tensors: Parts, kind: Kind, said: dict = FULL) -> tuple[Parts, Parts, dict[str, str]]:
    """(a file's tensors, the same with the numbers that they stand for, the file's metadata)"""
    found = {"scaled_fp8": torch.zeros(2, dtype=kind.old)} if kind.old else {}
    exact, layers = {}, {}
    for name, tensor in tensors.items():
        sizes = () if tensor.ndim != 2 or not name.endswith(".weight") or "pos_embed" in name else tensor.shape
        if not sizes or kind.old is None and any(size % EVERY for size in sizes):
            found[name] = exact[name] = tensor
            continue
        module, settings = name.removesuffix("weight"), {"format": kind.name, **(kind.said or {}), **said}
        parts, exact[name] = kind.make(tensor)
        if kind.old:
            parts["scale_weight"] = parts.pop("weight_scale")
        elif kind.in_metadata:
            layers[module.rstrip(".")] = settings
        else:
            parts["comfy_quant"] = as_json(settings)
        found |= {module + leaf: part for leaf, part in parts.items()}
    text = json.dumps({"format_version": "1.0", "layers": layers})
    return found, exact, {"_quantization_metadata": text} if layers else {}


CASES = {"qwen_image": "qwen_image_wide", "flux1": "flux1_wide", "sd35": "sd35"}
PLAIN = {"qwen_image": "3-4", "flux1": "9-10", "sd35": "4-5"}  # an interval without a correction
everywhere = pytest.mark.parametrize(("architecture", "host_case"), CASES.items(), ids=CASES, indirect=True)
on_flux = pytest.mark.parametrize(
    ("architecture", "host_case"), [("flux1", "flux1_wide")], ids=["flux1"], indirect=True
)


@pytest.fixture(scope="module")
def files(host_tensors, models, teacher, host_case):
    """(a base in this format, the same in full precision), each written once"""

    def make(name: str, said: dict = FULL, prefix: str = "") -> tuple[str, str]:
        paths = [models.diffusion_models / f"{host_case.file} {name}{ending}.safetensors" for ending in ("", " exact")]
        *contents, metadata = stored(host_tensors, KINDS[name], said)
        for path, content in zip(paths, contents, strict=True):
            about = TensorFile(teacher).metadata | (metadata if path is paths[0] else {})
            write_tensors(path, {prefix + name: tensor for name, tensor in content.items()}, about)
        return paths[0].name, paths[1].name

    return make


@torch.inference_mode()
def numbers(model) -> dict[str, torch.Tensor]:
    """What each map of a loaded model multiplies with."""
    found = {}
    for name, module in model.model.diffusion_model.named_modules():
        weight, scale = module._parameters.get("weight"), getattr(module, "scale_weight", None)
        if isinstance(weight, comfy.quant_ops.QuantizedTensor):
            found[name] = weight.dequantize()
        elif weight is not None:
            found[name] = weight.float() * (1 if scale is None else scale)
    return found


def farthest(model, exact) -> float:
    theirs = numbers(exact)
    assert (ours := numbers(model)).keys() == theirs.keys()
    return max(relative_error(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", READ)
@on_flux
def test_a_base(load, switched, velocity, bundle, files, name, caplog):
    """Of a switchable model, and of one that holds a variant alone, whose maps are cut."""
    (base, exact), kind = files(name), KINDS[name]
    for variant, switchable in (("full", True), ("smallest", True), ("smallest", False)):
        expected = load(bundle.name, base=exact, variant=variant, switchable=switchable)
        caplog.clear()
        model = load(bundle.name, base=base, variant=variant, switchable=switchable, weight_dtype="default")
        assert not [line for line in caplog.messages if "missing" in line or "unexpected" in line]
        near = ROUNDED if kind.old else NEAR
        assert farthest(model, expected) < (near if not switchable or kind.old else EXACT)
        bound = EXACT if variant == "full" else near
        assert relative_error(velocity(model), velocity(expected)) < kind.far(bound)
