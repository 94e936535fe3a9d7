"""A weight of few bits in a format of this host: what it stands for, what is left of it when it is
cut, how it is handed over.

ComfyUI 0.3.75 reads scaled fp8 (a mark, and a scale for every matrix) and fp8 that its settings
name by layer; newer hosts read many formats, each matrix's in a `comfy_quant` tensor beside it.
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
SCALES = (SCALE, "weight_scale_2", INPUT_SCALE, "pre_quant_scale")
ONE_SCALE = ((), (1,), (1, 1))  # shapes
FLOAT8 = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
# the host looks for a matrix's format in the file itself
IN_FILE = hasattr(comfy.utils, "convert_old_quants")
HOST = f"ComfyUI {comfyui_version.__version__}"


@dataclass(frozen=True)
class Held:
    """A tensor in memory, as those of files are given."""

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
    """A linear map's weight. parts: "weight" and its scales -> where each is (`.shape`, `.dtype`,
    `.read()`). settings: of its format, as `comfy_quant` has them; None: another pack's, passed on
    as it is. old: of a scaled fp8 file, and what that keeps matrices in. cut: what is left of
    it."""

    parts: dict
    settings: dict | None = None
    old: torch.dtype | None = None
    cut: Cut = Cut()

    @property
    def format(self) -> str | None:
        return self.settings and self.settings["format"]

    @property
    def whole(self) -> tuple[int, int]:
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
        """Whether what is left can stay in its format: all, or numbers that share one scale, or
        rows with one each."""
        if self.cut == Cut():
            return True
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
        """As they are stored."""
        return self.parts["weight"].first_rows(rows)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """What is left, as numbers, by the host's own arithmetic."""
        parts = {leaf: part.read() for leaf, part in self.parts.items()}
        if self.old is not None:
            found = parts["weight"].float() * parts[SCALE].float()
        else:
            found = _filled(
                _linear_kind(self.settings, dtype), self.whole, parts, self.settings
            ).weight.dequantize()
        if "pre_quant_scale" in parts:  # inputs are multiplied by it
            found = found.float() * parts["pre_quant_scale"].float()
        return self.cut.of(found.to(dtype))

    def read(self) -> torch.Tensor:
        return self.values(torch.bfloat16)

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | Quantised:
        """What is left, with other numbers."""
        weight = change(self.read())
        if self.old is None or IN_FILE:
            return weight
        values, scale = scaled_fp8(weight, self.old)
        return replace(self, parts={"weight": Held(values), SCALE: Held(scale)}, cut=Cut())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Leaf -> tensor, as this host reads them."""
        if self.keeps:
            return spelled({leaf: self._left(leaf) for leaf in self.parts}, self.settings, self.old)
        return plain_tensors(self.read(), self.old)

    def _left(self, leaf: str) -> torch.Tensor:
        tensor = self.parts[leaf].read()
        by_row = leaf == "weight" or leaf == SCALE and tensor.numel() > 1
        return self.cut.of(tensor) if by_row else tensor


def spelled(
    parts: dict[str, torch.Tensor], settings: dict | None, old: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """A matrix and its scales as this host wants them."""
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
    values, scale = scaled_fp8(weight, dtype)
    settings = {"format": FLOAT8[dtype], "full_precision_matrix_mult": True}
    return spelled({"weight": values, SCALE: scale}, settings, dtype)


def plain_tensors(weight: torch.Tensor, old: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Of a matrix that had to leave its format. A host that has scaled fp8 (`old`) for all matrices
    or none gets it in that."""
    return {"weight": weight} if old is None or IN_FILE else in_fp8(weight, old)


def expanded(tensors: Mapping) -> Iterator[tuple[str, torch.Tensor]]:
    """Name -> tensor, of such among which matrices of few bits are."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Quantised):
            module = name.removesuffix("weight")
            yield from ((module + leaf, part) for leaf, part in tensor.tensors().items())
        else:
            yield name, tensor


@cache
def columns_in_one(name: str) -> int:
    """How many columns of a matrix one column of what is stored holds: the host's own code packs
    them."""
    layout = comfy.quant_ops.QUANT_ALGOS[name]["comfy_tensor_layout"]
    probe = torch.ones(256, 256)
    stored = comfy.quant_ops.QuantizedTensor.from_float(probe, layout)._qdata
    return probe.shape[1] // stored.shape[1]


def _rotated(settings: dict) -> bool:
    """Neighbouring columns are then mixed."""
    more = settings.get("params")
    return bool({**(more if isinstance(more, dict) else {}), **settings}.get("convrot"))


def _linear_kind(settings: dict, dtype: torch.dtype, **options) -> type[nn.Module]:
    """The host's linear maps for a matrix of this format, computing in `dtype`."""
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
    """One of a model's linear maps by itself; `tensors` as `Quantised.tensors` and a bias."""
    linear = new_linear(shape[1], shape[0], device="cpu")
    # those of this host find their formats by their own names in the model
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


def refuse_unused_scales(module: nn.Module, found) -> None:
    """After a model was filled: a scale that nobody took means weights that are read wrong."""
    kinds = {*SCALES, OLD_NAMES[SCALE]} - {INPUT_SCALE}
    unused = [name for name in found.unexpected_keys if name.rpartition(".")[2] in kinds]
    if unused:
        raise ValueError(
            f"{HOST} does not use {len(unused)} of the file's scales, first {unused[0]}: its weights would be wrong; take "
            "the model in another format"
        )
