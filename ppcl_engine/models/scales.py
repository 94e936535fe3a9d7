"""Scales of quantised weights: which weight each belongs to, which part of it, and which formats
are refused by name.

Read: float8 and int8 with one scale a tensor, one a row, or one a block of a row's columns, under
ComfyUI's old and new names; int8 with rotated columns, w4a4, mxfp8 and nvfp4 through comfy-kitchen;
GGUF through gguf. The declared format of a layer (`comfy_quant`, or the metadata's
`_quantization_metadata`) has priority over shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..architectures import Part
from ..system.few_bits import FORMATS, dequantised
from ..system.finite import BAD_MODEL, check_finite
from ..system.gguf_files import GGUFFile
from ..system.json_text import shown
from ..system.optional_packages import kitchen
from .declared_formats import FORMAT_SUFFIX, declared_formats
from .stored_layout import OpenFile, StoredTensors

SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
MORE_SUFFIXES = (".weight_scale_2", ".pre_quant_scale")  # of blocks' scales, and of inputs
IGNORED_SUFFIXES = (
    *SCALE_SUFFIXES,
    *MORE_SUFFIXES,
    ".scale_input",
    ".input_scale",
    FORMAT_SUFFIX,
)
PRODUCTS = {
    "float8_e4m3fn": (torch.float8_e4m3fn,),
    "float8_e5m2": (torch.float8_e5m2,),
    "int8_tensorwise": (torch.int8,),
}
"""ComfyUI's name of a format whose weights are stored values times a scale -> their dtypes"""
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
FOREIGN = {
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
TAKE = "take the model in bf16, fp16, fp8, int8, mxfp8, nvfp4 or GGUF"
AGAIN = "download the file again"


class Quantised(Protocol):
    """What makes numbers of a stored weight."""

    def whole(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the matrix, of the shape that is stored."""
        ...

    def apply(self, weight: torch.Tensor, part: Part) -> torch.Tensor:
        """The real values, in float32. `part`: which rows of the stored weight these are."""
        ...


@dataclass(frozen=True)
class Scale:
    """The scale of a stored weight: one number, one for each row, or [rows, blocks of columns,
    1]."""

    file: OpenFile
    name: str

    def whole(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return stored

    def apply(self, weight: torch.Tensor, part: Part) -> torch.Tensor:
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
        rows = _cut(rows, part)
        blocks = weight.reshape(len(weight), rows.shape[1], -1)
        return (blocks * rows[..., None]).reshape(weight.shape)


def _cut(rows: torch.Tensor, part: Part) -> torch.Tensor:
    """The rows of a whole matrix that are this part's."""
    if part.of == 1:
        return rows
    pieces = rows.chunk(part.of)
    return torch.cat([pieces[piece] for piece in part.pieces])


@dataclass(frozen=True)
class Packed:
    """A stored weight in one of comfy-kitchen's formats."""

    file: OpenFile
    name: str
    """the weight's, in the file"""
    format: str
    settings: Mapping[str, Any]
    """what `comfy_quant` says"""
    scales: Mapping[str, tuple[OpenFile, str]]
    """last part of the name -> where the scale is"""

    def whole(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return stored[0], stored[1] * FORMATS[self.format].packed

    def apply(self, weight: torch.Tensor, part: Part) -> torch.Tensor:
        # scales of blocks lie in tiles of rows, so a part is cut out of the whole matrix
        stored = weight if part.of == 1 else self.file.read(self.name).to(weight.device)
        scales = {leaf: file.read(key) for leaf, (file, key) in self.scales.items()}
        smoothing = scales.pop("pre_quant_scale", None)  # inputs are multiplied by it
        kitchen(f"{self.file.path}: a matrix in the format {self.format}")
        try:
            values = dequantised(self.format, stored, scales, self.settings)
        except (
            RuntimeError,
            AssertionError,
            ValueError,
        ) as error:  # sizes that do not fit together
            reason = " ".join(str(error).split())[:120]
            raise ValueError(
                f"{self.file.path}: {shown(self.name)} cannot be read as {self.format} ({reason}); {AGAIN}"
            ) from None
        if smoothing is not None:
            values = values * smoothing.to(values)
        check_finite({shown(self.name): values}, self.file.path, BAD_MODEL)
        return _cut(values, part)


@dataclass(frozen=True)
class Blocks:
    """A stored weight of a GGUF file, in blocks of a row's columns with a scale each."""

    file: GGUFFile
    name: str

    def whole(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return self.file.whole(self.name)

    def apply(self, weight: torch.Tensor, part: Part) -> torch.Tensor:
        values = self.file.dequantised(self.name, weight)
        check_finite({shown(self.name): values}, self.file.path, BAD_MODEL)
        return values


def scales_of(
    stored: StoredTensors, metadata: Mapping[str, str], where: Path
) -> dict[str, Quantised]:
    """Weight's name -> what makes numbers of it.

    Raises ValueError naming the tensor and the format for anything that is not read: other formats,
    scales without a weight or of the wrong shape, and weights in eight bits or fewer without the
    scale that they need.
    """
    for name in stored:
        if foreign := _ending(name, FOREIGN):
            raise ValueError(
                f"{where}: {shown(name)} belongs to {FOREIGN[foreign]}, which is not read; {TAKE}"
            )
    declared = declared_formats(stored, metadata, where)
    found: dict[str, Quantised] = dict(_packed(stored, declared, where))
    found |= {
        name: Blocks(file, key)
        for name, (file, key) in stored.items()
        if isinstance(file, GGUFFile) and file.is_quantised(key)
    }
    scales = _products(stored, found, where)
    _check_declared(stored, declared, {**found, **scales}, where)
    for name, place in stored.items():
        if not name.endswith(IGNORED_SUFFIXES) and name not in found:
            _check_weight(name, place, scales.get(name), where)
    return {**found, **scales}


def shape_in(
    place: tuple[OpenFile, str], name: str, scales: Mapping[str, Quantised]
) -> tuple[int, ...]:
    """The shape of a tensor, of a quantised matrix that of its numbers."""
    file, key = place
    shape = file.shape(key)
    return scales[name].whole(shape) if name in scales else shape


def _ending(name: str, endings) -> str | None:
    return next((ending for ending in endings if name.endswith(ending)), None)


def _products(
    stored: StoredTensors, others: Mapping[str, Quantised], where: Path
) -> dict[str, Scale]:
    """The weights that are stored values times a scale. others: in other formats."""
    scales: dict[str, Scale] = {}
    for name, (file, key) in stored.items():
        ending = _ending(name, (*SCALE_SUFFIXES, *MORE_SUFFIXES))
        if ending is None:
            continue
        weight = name.removesuffix(ending) + ".weight"
        if weight in others:
            continue
        if weight not in stored:
            raise ValueError(
                f"{where}: {shown(name)} is a scale, but there is no {weight}; {AGAIN}"
            )
        if ending in MORE_SUFFIXES:
            raise ValueError(
                f"{where}: {shown(name)} belongs to NVFP4, which the file does not say of {weight}; {AGAIN}"
            )
        if weight in scales:
            raise ValueError(
                f"{where}: {shown(weight)} has two scales, {scales[weight].name} and {key}; remove one of the two"
            )
        scales[weight] = Scale(file, key)
    return scales


def _packed(
    stored: StoredTensors, declared: Mapping[str, dict], where: Path
) -> Iterator[tuple[str, Packed]]:
    """The weights that are declared to be in a format that comfy-kitchen reads."""
    for layer, settings in declared.items():
        kind, weight = settings.get("format"), f"{layer}.weight"
        if not isinstance(kind, str) or kind not in FORMATS or weight not in stored:
            continue
        if kind in PRODUCTS and not settings.get("convrot"):
            continue
        file, key = stored[weight]
        if file.dtype(key) not in FORMATS[kind].dtypes or len(file.shape(key)) != 2:
            raise _not_as_declared(weight, kind, where)
        leaves = (*FORMATS[kind].scales, *(["pre_quant_scale"] if kind == "nvfp4" else []))
        scales = {leaf: stored[f"{layer}.{leaf}"] for leaf in leaves if f"{layer}.{leaf}" in stored}
        for leaf in FORMATS[kind].scales:
            if leaf not in scales:
                raise _without_scale(weight, kind, leaf, where)
        matrix = Packed(file, key, kind, settings, scales)
        _check_rotation(settings, matrix.whole(file.shape(key))[1], f"{where}: {shown(weight)}")
        yield weight, matrix


def _check_rotation(settings: Mapping[str, Any], columns: int, where: str) -> None:
    """Raises ValueError for groups that do not divide the columns: the rotation of a large one would
    fill the memory."""
    group = settings.get("convrot_groupsize", 1)
    if not isinstance(group, int) or not 0 < group <= columns or columns % group:
        raise ValueError(
            f"{where} has columns rotated in groups of {str(group)[:20]}, which do not divide its {columns}; {AGAIN}"
        )


def _not_as_declared(weight: str, kind: str, where: Path) -> ValueError:
    return ValueError(
        f"{where}: {shown(weight)} is declared as {kind}, but stored as another type; {AGAIN}"
    )


def _without_scale(weight: str, kind: str, leaf: str, where: Path) -> ValueError:
    return ValueError(f"{where}: {shown(weight)} is {kind} and has no scale (.{leaf}); {AGAIN}")


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


def _check_declared(
    stored: StoredTensors,
    declared: Mapping[str, dict],
    scales: Mapping[str, Quantised],
    where: Path,
) -> None:
    """Raises ValueError for a layer whose declared format is not read, or is not how it is
    stored."""
    for layer, settings in declared.items():
        weight, kind = f"{layer}.weight", settings.get("format")
        if not isinstance(kind, str) or kind not in {*PRODUCTS, *FORMATS}:
            raise ValueError(
                f"{where}: {shown(weight)} is in the format {str(kind)[:40]!r}, which is not read; {TAKE}"
            )
        if weight not in stored:
            raise ValueError(
                f"{where}: {shown(layer)} has a format ({kind}) but no weight; {AGAIN}"
            )
        file, key = stored[weight]
        if kind in PRODUCTS and file.dtype(key) not in PRODUCTS[kind]:
            raise _not_as_declared(weight, kind, where)
        if weight not in scales:
            raise _without_scale(weight, kind, "weight_scale", where)
