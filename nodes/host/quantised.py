"""A quantised weight in one of the host's formats: the numbers it stands for, what is left of it when
it is cut, and how the host wants it.

ComfyUI 0.3.75 reads scaled fp8 (a mark, and a scale for every matrix) and fp8 whose layers are named
in its settings. Newer versions read many formats; a `comfy_quant` tensor beside each matrix names
its format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import comfy.ops
import comfy.quant_ops
import comfy.utils
import comfyui_version
import torch
from torch import nn

from ...ppcl_engine.models.stored_layout import as_tensor
from ...ppcl_engine.system.float8 import scaled_fp8
from .base import ALL, Cut

FORMAT, SCALE, INPUT_SCALE = (
    "comfy_quant",
    "weight_scale",
    "input_scale",
)  # the last: of inputs, where they are rounded too
OLD_NAMES = {SCALE: "scale_weight", INPUT_SCALE: "scale_input"}
GROUPED = ("weight_s_rel", "weight_s_channel")  # of groups of columns, and of rows
SCALES = (SCALE, "weight_scale_2", INPUT_SCALE, "pre_quant_scale", *GROUPED, "weight_codebook")
# formats whose scales the host's table does not name
NOT_LISTED = {"asym_w4a8_int8": {*GROUPED, "weight_codebook"}}
ONE_SCALE = ((), (1,), (1, 1))  # shapes
FLOAT8 = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
# newer hosts find the format of a matrix in the file itself; older ones are told by layer
IN_FILE = hasattr(comfy.utils, "convert_old_quants")
HOST = f"ComfyUI {comfyui_version.__version__}"


@dataclass(frozen=True)
class Held:
    """A tensor in memory, with the same methods as the location of one in a file."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> torch.Tensor:
        return self.tensor


@dataclass(frozen=True, eq=False)
class Quantised:
    """A linear map's weight."""

    parts: dict
    """"weight" and its scales -> where each is: an object with `.shape`, `.dtype`, `.read()`"""
    settings: dict | None = None
    """of its format, as `comfy_quant` has them; None: in another pack's format, passed on as it
    is"""
    old: torch.dtype | None = None
    """dtype of the matrices, if it is from a scaled fp8 file"""
    cut: Cut = Cut()
    """what is left of it"""

    @property
    def format(self) -> str | None:
        return self.settings and self.settings["format"]

    @property
    def whole(self) -> tuple[int, int]:
        """Shape of the full matrix that it stands for."""
        rows, columns = self.parts["weight"].shape
        packed = self.settings is not None and self.old is None
        return rows, columns * (columns_in_one(self.format) if packed else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cut.shape(self.whole)

    def with_cut(self, cut: Cut) -> Quantised:
        assert self.cut == Cut(), "a tensor is cut once"
        return replace(self, cut=cut)

    @property
    def keeps(self) -> bool:
        """Whether what is left can stay in its format. It can if nothing was cut off, if all numbers
        share one scale, or if rows were cut off that have a scale each."""
        if self.cut == Cut():
            return True
        if SCALE not in self.parts:
            return False
        rows, scales = self.whole[0], tuple(self.parts[SCALE].shape)
        single = self.whole == tuple(self.parts["weight"].shape) and self.parts.keys() <= {
            "weight",
            SCALE,
            "input_scale",
        }
        shared = scales in ONE_SCALE and not _rotated(self.settings)
        return single and (
            shared or scales in (*ONE_SCALE, (rows,), (rows, 1)) and self.cut.columns == ALL
        )

    def first_rows(self, rows: int) -> torch.Tensor:
        """The first rows of the weight as they are stored."""
        return self.parts["weight"].first_rows(rows)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """What is left of the weight, as numbers that the host's own code computes."""
        parts = {leaf: part.read() for leaf, part in self.parts.items()}
        if self.old is not None:
            numbers = parts["weight"].float() * parts[SCALE].float()
        else:
            numbers = _filled(
                _linear_kind(self.settings, dtype), self.whole, parts, self.settings
            ).weight.dequantize()
        if "pre_quant_scale" in parts:  # inputs are multiplied by it
            numbers = numbers.float() * parts["pre_quant_scale"].float()
        return self.cut.of(numbers.to(dtype))

    def read(self) -> torch.Tensor:
        return self.values(torch.bfloat16)

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | Quantised:
        """What is left of the weight with `change` applied to its numbers."""
        weight = change(self.read())
        if self.old is None or IN_FILE:
            return weight
        values, scale = scaled_fp8(weight, self.old)
        return replace(self, parts={"weight": Held(values), SCALE: Held(scale)}, cut=Cut())

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is left of the weight and its scales: last part of the name -> tensor, as this host
        reads them."""
        if self.keeps:
            return spelled({leaf: self._left(leaf) for leaf in self.parts}, self.settings, self.old)
        return plain_tensors(self.read(), self.old)

    def _left(self, leaf: str) -> torch.Tensor:
        tensor = self.parts[leaf].read()
        by_row = leaf == "weight" or leaf == SCALE and tensor.numel() > 1
        return self.cut.of(tensor) if by_row else tensor


def can_be_joined(pieces: list[Quantised]) -> bool:
    """Whether pieces of one matrix can stay in their format: all in the same, with a scale for each
    row and no other."""
    first = pieces[0]
    return all(
        piece.settings is not None
        and piece.settings == first.settings
        and piece.keeps
        and piece.parts.keys() == {"weight", SCALE}
        and tuple(piece.parts[SCALE].shape) in ((piece.whole[0],), (piece.whole[0], 1))
        for piece in pieces
    )


def spelled(
    parts: dict[str, torch.Tensor], settings: dict | None, old: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """A matrix and its scales by the names that this host has for them."""
    if settings is None:
        return parts
    if old is None or IN_FILE:
        used = {
            leaf: t
            for leaf, t in parts.items()
            if old is None or leaf != INPUT_SCALE or float(t) != 1
        }
        return {**used, FORMAT: as_tensor(settings)}
    return {OLD_NAMES.get(leaf, leaf): tensor for leaf, tensor in parts.items()}


def in_fp8(weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A matrix rounded to scaled fp8, and its scale, as this host reads them."""
    values, scale = scaled_fp8(weight, dtype)
    settings = {"format": FLOAT8[dtype], "full_precision_matrix_mult": True}
    return spelled({"weight": values, SCALE: scale}, settings, dtype)


def plain_tensors(weight: torch.Tensor, old: torch.dtype | None) -> dict[str, torch.Tensor]:
    """A matrix that could not stay in its format. An older host wants all matrices in scaled fp8 or
    none, so there it gets that (`old`: its dtype)."""
    return {"weight": weight} if old is None or IN_FILE else in_fp8(weight, old)


def expanded(tensors: Mapping) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all, each `Quantised` as its weight and scales."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Quantised):
            module = name.removesuffix("weight")
            yield from ((module + leaf, part) for leaf, part in tensor.tensors().items())
        else:
            yield name, tensor


@cache
def columns_in_one(name: str) -> int:
    """How many columns of a matrix are packed into one stored column. The host's own code packs a
    small matrix to find out."""
    layout = comfy.quant_ops.QUANT_ALGOS[name]["comfy_tensor_layout"]
    probe = torch.ones(256, 256)
    stored = comfy.quant_ops.QuantizedTensor.from_float(probe, layout)._qdata
    return probe.shape[1] // stored.shape[1]


def _rotated(settings: dict) -> bool:
    """Whether the format mixes neighbouring columns, so that none can be cut off."""
    more = settings.get("params")
    return bool({**(more if isinstance(more, dict) else {}), **settings}.get("convrot"))


def _linear_kind(settings: dict, dtype: torch.dtype, **options) -> type[nn.Module]:
    """The host's class of linear maps for a matrix of this format, computing in `dtype`."""
    return comfy.ops.mixed_precision_ops({} if IN_FILE else {"": settings}, dtype, **options).Linear


def _filled(
    kind: type[nn.Module], shape: tuple[int, int], parts: dict, settings: dict
) -> nn.Module:
    linear = kind(shape[1], shape[0], bias="bias" in parts, device="cpu")
    linear.load_state_dict({**parts, FORMAT: as_tensor(settings)} if IN_FILE else parts)
    return linear


def filled_linear(
    new_linear, shape: tuple[int, int], tensors: dict[str, torch.Tensor]
) -> nn.Module:
    """One of a model's linear maps by itself. tensors: as `Quantised.tensors` gives them, and a
    bias."""
    linear = new_linear(shape[1], shape[0], device="cpu")
    # an older host finds a layer's format by its name in the model, which a single map has not
    if FORMAT in tensors and not IN_FILE:
        settings = read_settings(tensors[FORMAT])
        options = {"full_precision_mm": linear._full_precision_mm}
        kind = _linear_kind(settings, linear.factory_kwargs["dtype"], **options)
        return _filled(
            kind, shape, {leaf: t for leaf, t in tensors.items() if leaf != FORMAT}, settings
        )
    linear.load_state_dict(tensors, strict=False)
    return linear


def read_settings(tensor: torch.Tensor) -> dict:
    return json.loads(bytes(tensor.tolist()))


def refuse_unused_scales(module: nn.Module, incompatible) -> None:
    """Called when a model was filled: a scale that no layer took means that its weights are read
    wrongly. Raises ValueError then."""
    kinds = {*SCALES, OLD_NAMES[SCALE]} - {INPUT_SCALE}
    unused = [name for name in incompatible.unexpected_keys if name.rpartition(".")[2] in kinds]
    if unused:
        raise ValueError(
            f"{HOST} does not use {len(unused)} of the file's scales, first {unused[0]}: its weights would be wrong; use "
            "the model in another format"
        )
