"""Scales of quantised weights: which weight each belongs to, which part of it, and which formats
are refused by name.

Read: float8 and int8 with one scale a tensor, one a row, or one a block of a row's columns, under
ComfyUI's old and new names. The declared format of a layer (`comfy_quant`, or the metadata's
`_quantization_metadata`) has priority over shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..architectures import Part
from ..system.json_text import NotJSON, parse_json, shown
from .stored_layout import PREFIXES, OpenFile, StoredTensors

SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
FORMAT_SUFFIX = ".comfy_quant"
IGNORED_SUFFIXES = (*SCALE_SUFFIXES, ".scale_input", ".input_scale", FORMAT_SUFFIX)
FORMATS_KEY = "_quantization_metadata"
FORMATS = {
    "float8_e4m3fn": (torch.float8_e4m3fn,),
    "float8_e5m2": (torch.float8_e5m2,),
    "int8_tensorwise": (torch.int8,),
}
"""ComfyUI's name of a format -> the dtypes that such a weight is stored in"""
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
FOREIGN = {
    ".weight_scale_2": "NVFP4",
    ".pre_quant_scale": "NVFP4 with smoothed inputs",
    ".weight_s_rel": "W4A8 (asym_w4a8_int8)",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes NF4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes FP4",
    ".absmax": "bitsandbytes in 4 bits",
    ".SCB": "bitsandbytes INT8",
    ".qzeros": "GPTQ or AWQ",
    ".wscales": "Nunchaku (SVDQuant)",
    ".smooth_factor": "Nunchaku (SVDQuant)",
    ".qweight": "packed in 4 bits (Nunchaku, GPTQ or AWQ)",
}
"""endings of tensor names -> the format that has them"""
TAKE = "take the model in bf16, fp16, fp8 or plain int8"


@dataclass(frozen=True)
class Scale:
    """The scale of a stored weight: one number, one for each row, or [rows, blocks of columns,
    1]."""

    file: OpenFile
    name: str

    def apply(self, weight: torch.Tensor, part: Part) -> torch.Tensor:
        """The real values, in float32. `part`: which rows of the stored weight these are."""
        scale = self.file.read(self.name).to(weight.device).float()
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise ValueError(
                f"{self.file.path}: {shown(self.name)} has scales that are not numbers from 0; download the file again"
            )
        values = self._scaled(weight.float(), scale, part)
        if bool((scale == 0).any()) and bool(((values == 0) & (weight.float() != 0)).any()):
            raise ValueError(
                f"{self.file.path}: {shown(self.name)} is 0 where its weights are not; download the file again"
            )
        return values

    @staticmethod
    def _scaled(weight: torch.Tensor, scale: torch.Tensor, part: Part) -> torch.Tensor:
        if scale.numel() == 1:
            return weight * scale.reshape(())
        rows = scale.reshape(len(scale), -1)
        if part.of > 1:
            pieces = rows.chunk(part.of)
            rows = torch.cat([pieces[piece] for piece in part.pieces])
        blocks = weight.reshape(len(weight), rows.shape[1], -1)
        return (blocks * rows[..., None]).reshape(weight.shape)


def scales_of(stored: StoredTensors, metadata: Mapping[str, str], where: Path) -> dict[str, Scale]:
    """Weight's name -> its scale.

    Raises ValueError naming the tensor and the format for anything that is not read: other formats,
    scales without a weight or of the wrong shape, and weights in eight bits without the scale that
    they need.
    """
    for name in stored:
        if foreign := next(
            (said for ending, said in FOREIGN.items() if name.endswith(ending)), None
        ):
            raise ValueError(
                f"{where}: {shown(name)} belongs to {foreign}, which is not read; {TAKE}"
            )
    scales: dict[str, Scale] = {}
    for name, (file, key) in stored.items():
        ending = next((ending for ending in SCALE_SUFFIXES if name.endswith(ending)), None)
        if ending is None:
            continue
        weight = name.removesuffix(ending) + ".weight"
        if weight not in stored:
            raise ValueError(
                f"{where}: {shown(name)} is a scale, but there is no {weight}; download the file again"
            )
        if weight in scales:
            raise ValueError(
                f"{where}: {shown(weight)} has two scales, {scales[weight].name} and {key}; remove one of the two"
            )
        scales[weight] = Scale(file, key)
    _check_formats(stored, metadata, scales, where)
    for name, place in stored.items():
        if not name.endswith(IGNORED_SUFFIXES):
            _check_weight(name, place, scales.get(name), where)
    return scales


def _check_weight(name: str, place: tuple[OpenFile, str], scale: Scale | None, where: Path) -> None:
    file, key = place
    if file.stored_as(key) in ("F4", "F8_E8M0"):
        raise ValueError(
            f"{where}: {shown(name)} is {file.stored_as(key)} (MXFP8, MXFP4 or NVFP4), which is not read; {TAKE}"
        )
    dtype = file.dtype(key)
    if scale is None:
        if dtype is torch.int8 and name.endswith(".weight"):
            raise ValueError(
                f"{where}: {shown(name)} is int8 and has no scale (.weight_scale), so its values are not known; {TAKE}"
            )
        return
    if dtype not in EIGHT_BITS:
        raise ValueError(
            f"{where}: {shown(name)} has a scale, but is {dtype}, not fp8 or int8; {TAKE}"
        )
    shape, rows = file.shape(key), scale.file.shape(scale.name)
    if not scale.file.dtype(scale.name).is_floating_point or not _fits(rows, shape):
        raise ValueError(
            f"{where}: {shown(scale.name)} {rows} is not a scale of {name} {shape}: one number, one a row ({shape[0] if shape else 1}), or "
            "[rows, blocks of columns, 1] are read"
        )


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    if scale in ((), (1,), (1, 1)):
        return True
    if len(weight) < 2 or scale[:1] != weight[:1]:
        return False
    if len(scale) == 3 and scale[2] == 1 and len(weight) == 2:
        return scale[1] > 0 and weight[1] % scale[1] == 0
    return all(size == 1 for size in scale[1:])


def _check_formats(
    stored: StoredTensors, metadata: Mapping[str, str], scales: Mapping[str, Scale], where: Path
) -> None:
    """Raises ValueError for a layer whose declared format is not read, or is not how it is
    stored."""
    for layer, about in _formats(stored, metadata, where).items():
        weight, kind = f"{layer}.weight", about.get("format")
        details = {**(about["params"] if isinstance(about.get("params"), dict) else {}), **about}
        if details.get("convrot"):
            raise ValueError(
                f"{where}: {shown(weight)} is INT8 ConvRot: its columns are rotated, which is not undone here; {TAKE}"
            )
        if not isinstance(kind, str) or kind not in FORMATS:
            raise ValueError(
                f"{where}: {shown(weight)} is in the format {str(kind)[:40]!r}, which is not read; {TAKE}"
            )
        if weight not in stored:
            raise ValueError(
                f"{where}: {shown(layer)} has a format ({kind}) but no weight; download the file again"
            )
        if stored[weight][0].dtype(stored[weight][1]) not in FORMATS[kind]:
            raise ValueError(
                f"{where}: {shown(weight)} is declared as {kind}, but stored as another type; download the file again"
            )
        if weight not in scales:
            raise ValueError(
                f"{where}: {shown(weight)} is {kind} and has no scale (.weight_scale); download the file again"
            )


def _formats(stored: StoredTensors, metadata: Mapping[str, str], where: Path) -> dict[str, dict]:
    """Layer -> its declared format; only layers that exist, whatever prefix the metadata gives
    them."""
    declared = {}
    for name, (file, key) in stored.items():
        if name.endswith(FORMAT_SUFFIX):
            text = bytes(file.read(key).reshape(-1).view(torch.uint8).tolist())
            declared[name.removesuffix(FORMAT_SUFFIX)] = _object(text, f"{where}: {shown(name)}")
    layers = (
        _object(metadata[FORMATS_KEY], f"{where}: {FORMATS_KEY}").get("layers")
        if FORMATS_KEY in metadata
        else {}
    )
    if not isinstance(layers, dict) or not all(
        isinstance(about, dict) for about in layers.values()
    ):
        raise ValueError(
            f"{where}: {FORMATS_KEY}: its layers are not JSON objects; download the file again"
        )
    ours = {
        key.removesuffix(".weight"): name.removesuffix(".weight")
        for name, (_, key) in stored.items()
    }
    by_layer = {ours.get(name, _bare(name)): about for name, about in layers.items()}
    return {layer: a for layer, a in by_layer.items() if f"{layer}.weight" in stored} | declared


def _bare(layer: str) -> str:
    """Without the prefixes that checkpoints and trainers put before a transformer's names."""
    while prefix := next((p for p in PREFIXES if layer.startswith(p)), None):
        layer = layer.removeprefix(prefix)
    return layer


def _object(text: str | bytes, where: str) -> dict:
    try:
        value = parse_json(text)
    except NotJSON as error:
        raise ValueError(f"{where}: not JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object; download the file again")
    return value
