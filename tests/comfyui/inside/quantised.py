"""Formats of few bits that people have models in: how a file keeps a matrix, and the numbers that
it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import comfy.quant_ops
import comfy.utils
import torch

# the same numbers; some of them in 16 bits; students in fp8 too
EXACT, NEAR, ROUNDED = 1e-5, 1e-2, 0.1
INPUTS = {
    "int8_tensorwise": 0.05,
    "convrot_w4a4": 0.5,
    "asym_w4a8_int8": 0.05,
}  # what a model changes where the host rounds inputs too
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
KNOWN = comfy.quant_ops.QUANT_ALGOS
EVERY = 64  # what both sizes of a matrix are multiples of, in all these formats
SAID = {"full_precision_matrix_mult": True}
# the host reads a matrix's format out of the file
NEWER = hasattr(comfy.utils, "convert_old_quants")
QuantisedTensors = dict[str, torch.Tensor]


def in_float8(
    weight: torch.Tensor, dtype=torch.float8_e4m3fn
) -> tuple[QuantisedTensors, torch.Tensor]:
    scale = weight.abs().max() / LARGEST[dtype]
    values = (weight / scale).to(dtype)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def in_int8(weight: torch.Tensor, by_row: bool = False) -> tuple[QuantisedTensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()) / 127
    values = (weight / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def in_half_bytes(weight: torch.Tensor) -> tuple[QuantisedTensors, torch.Tensor]:
    """Tensors with nothing right but their shapes, for hosts that do not read them."""
    rows, columns = weight.shape
    scales = {"weight_scale": torch.ones(rows, columns // 16), "weight_scale_2": torch.ones(())}
    return {"weight": torch.zeros(rows, columns // 2, dtype=torch.uint8), **scales}, weight


def by_the_host(
    weight: torch.Tensor, name: str, **options
) -> tuple[QuantisedTensors, torch.Tensor]:
    if name not in KNOWN:
        return in_half_bytes(weight)
    layout = KNOWN[name]["comfy_tensor_layout"]
    found = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **options)
    return found.state_dict("weight"), found.dequantize()


def for_other_inputs(weight: torch.Tensor) -> tuple[QuantisedTensors, torch.Tensor]:
    """nvfp4 as ModelOpt writes it after smoothing: inputs are multiplied first."""
    first = torch.linspace(0.5, 2, weight.shape[1])
    parts, found = by_the_host(weight / first, "nvfp4")
    return {**parts, "pre_quant_scale": first}, found * first


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A format of quantised matrices."""

    name: str
    """the host's"""
    make: Callable[[torch.Tensor], tuple[QuantisedTensors, torch.Tensor]]
    """weight -> (its tensors in a file, the numbers that they stand for)"""
    said: dict | None = None
    """further settings that the file has for it"""
    old: torch.dtype | None = None
    """dtype of the matrices, if all of the file is scaled fp8"""
    in_metadata: bool = False
    """whether the file has the settings in its metadata"""

    @property
    def is_read(self) -> bool:
        return self.old is not None or self.name in KNOWN

    def far(self, least: float) -> float:
        """How far a model may be from that of the same numbers. ComfyUI 0.3.75 keeps scaled fp8
        models' biases in fp8."""
        return max(least, INPUTS.get(self.name, 0), ROUNDED if self.old and not NEWER else 0)


FP8, FP8_WIDE = torch.float8_e4m3fn, torch.float8_e5m2
ROTATED = {"convrot": True, "convrot_groupsize": EVERY}
KINDS = {
    "scaled fp8": Kind(name="float8_e4m3fn", make=in_float8, old=FP8),
    "scaled fp8 e5m2": Kind(
        name="float8_e5m2", make=lambda w: in_float8(w, FP8_WIDE), old=FP8_WIDE
    ),
    "float8_e4m3fn": Kind(name="float8_e4m3fn", make=in_float8),
    "float8_e4m3fn in metadata": Kind(name="float8_e4m3fn", make=in_float8, in_metadata=True),
    "float8_e5m2": Kind(name="float8_e5m2", make=lambda w: in_float8(w, FP8_WIDE)),
    "int8": Kind(name="int8_tensorwise", make=in_int8),
    "int8 by row": Kind(name="int8_tensorwise", make=lambda w: in_int8(w, by_row=True)),
    "int8 convrot": Kind(
        name="int8_tensorwise",
        make=lambda w: by_the_host(w, "int8_tensorwise", per_channel=True, **ROTATED),
        said=ROTATED,
    ),
    "mxfp8": Kind(name="mxfp8", make=lambda w: by_the_host(w, "mxfp8")),
    "nvfp4": Kind(name="nvfp4", make=lambda w: by_the_host(w, "nvfp4")),
    "nvfp4 smoothed": Kind(name="nvfp4", make=for_other_inputs),
    "convrot_w4a4": Kind(
        name="convrot_w4a4",
        make=lambda w: by_the_host(w, "convrot_w4a4", convrot_groupsize=EVERY),
        said={"convrot_groupsize": EVERY},
    ),
    "asym_w4a8_int8": Kind(
        name="asym_w4a8_int8",
        make=lambda w: by_the_host(w, "asym_w4a8_int8", convrot_groupsize=EVERY),
        said={"convrot_groupsize": EVERY},
    ),
    "float7": Kind(name="float7", make=in_int8),
}
READ = [name for name, kind in KINDS.items() if kind.is_read]
REFUSED = [name for name, kind in KINDS.items() if not kind.is_read]


def as_json(value: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def stored(
    tensors: QuantisedTensors, kind: Kind
) -> tuple[QuantisedTensors, QuantisedTensors, dict[str, str]]:
    """(a file's tensors, the same with the numbers that they stand for, the file's metadata)"""
    found = {"scaled_fp8": torch.zeros(2, dtype=kind.old)} if kind.old else {}
    exact, layers = {}, {}
    for name, tensor in tensors.items():
        matrix = name.endswith(".weight") and tensor.ndim == 2
        if not matrix or not kind.old and any(size % EVERY for size in tensor.shape):
            found[name] = exact[name] = tensor
            continue
        module, said = (
            name.removesuffix("weight"),
            {"format": kind.name, **(kind.said or {}), **SAID},
        )
        parts, exact[name] = kind.make(tensor)
        if kind.old:
            parts["scale_weight"] = parts.pop("weight_scale")
        elif kind.in_metadata:
            layers[module.rstrip(".")] = said
        else:
            parts["comfy_quant"] = as_json(said)
        found |= {module + leaf: part for leaf, part in parts.items()}
    text = json.dumps({"format_version": "1.0", "layers": layers})
    return found, exact, {"_quantization_metadata": text} if layers else {}


@torch.inference_mode()
def numbers(model) -> dict[str, torch.Tensor]:
    """What each map of a loaded model multiplies with."""
    found = {}
    for name, module in model.model.diffusion_model.named_modules():
        weight, scale = module._parameters.get("weight"), getattr(module, "scale_weight", None)
        if isinstance(weight, comfy.quant_ops.QuantizedTensor):
            first = getattr(module, "pre_quant_scale", None)
            found[name] = weight.dequantize() * (1 if first is None else first)
        elif weight is not None:
            found[name] = weight.float() * (1 if scale is None else scale)
    return found


def in_few_bits(layer) -> tuple[torch.Tensor, float]:
    """(what a map of the host keeps, its one scale)"""
    if isinstance(layer.weight, comfy.quant_ops.QuantizedTensor):
        return layer.weight._qdata, float(layer.weight._params.scale)
    return layer.weight, float(layer.scale_weight)
