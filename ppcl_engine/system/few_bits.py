"""ComfyUI's formats of few bits, one matrix at a time, as comfy-kitchen computes them.

A quantised matrix is a `weight`, its scales, and a `comfy_quant` tensor: JSON that names the format.
Scaled fp8, and int8 whose columns are not rotated, are a product of weight and scale, which
`models.scales` reads without this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .json_text import json_text
from .optional_packages import kitchen
from .tensor_files import MadeOnce, TensorEntry

FORMAT_LEAF = "comfy_quant"
ROTATIONS = (256, 64, 16)  # columns that ConvRot mixes; the hosts' kernels know these
Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How ComfyUI stores a matrix."""

    layout: str
    """comfy-kitchen's class of the format"""
    dtypes: tuple[torch.dtype, ...]
    """that a weight may be stored in"""
    scales: Mapping[str, str]
    """last part of a scale's name -> the class' parameter"""
    bytes_as: Mapping[str, str] = field(default_factory=dict)
    """scales that some files store as plain bytes -> the torch dtype that they are"""
    packed: int = 1
    """columns of the matrix in one stored column"""
    settings: tuple[str, ...] = ()
    """entries of `comfy_quant` that the class has as parameters"""


CONVROT = ("convrot_groupsize",)
FORMATS = {
    "int8_tensorwise": Format(
        layout="TensorWiseINT8Layout",
        dtypes=(torch.int8,),
        scales={"weight_scale": "scale"},
        settings=("convrot", *CONVROT),
    ),
    "convrot_w4a4": Format(
        layout="TensorCoreConvRotW4A4Layout",
        dtypes=(torch.int8, torch.uint8),
        scales={"weight_scale": "scale"},
        packed=2,
        settings=CONVROT,
    ),
    "mxfp8": Format(
        layout="TensorCoreMXFP8Layout",
        dtypes=(torch.float8_e4m3fn,),
        scales={"weight_scale": "scale"},
        bytes_as={"weight_scale": "float8_e8m0fnu"},
    ),
    "nvfp4": Format(
        layout="TensorCoreNVFP4Layout",
        dtypes=(torch.uint8,),
        scales={"weight_scale": "block_scale", "weight_scale_2": "scale"},
        bytes_as={"weight_scale": "float8_e4m3fn"},
        packed=2,
    ),
}
"""ComfyUI's name of a format -> how it is stored"""


def dequantised(
    name: str, weight: torch.Tensor, scales: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> torch.Tensor:
    """The numbers that a whole stored matrix stands for, in float32. scales: by the last parts of
    their names."""
    form = FORMATS[name]
    layout = kitchen(f"a matrix in the format {name}").get_layout_class(form.layout)
    tensors = {}
    for leaf, parameter in form.scales.items():
        scale = scales[leaf].to(weight.device)
        kind = getattr(torch, form.bytes_as[leaf]) if leaf in form.bytes_as else scale.dtype
        tensors[parameter] = scale.view(kind) if scale.dtype is torch.uint8 else scale
    known = {entry: settings[entry] for entry in form.settings if entry in settings}
    shape = (len(weight), weight.shape[1] * form.packed)
    parameters = layout.Params(**tensors, **known, orig_dtype=torch.float32, orig_shape=shape)
    return layout.dequantize(weight.contiguous(), parameters)


@dataclass(frozen=True, kw_only=True)
class Store:
    """A way of storing matrices that can be asked for."""

    format: str
    """ComfyUI's name"""
    rows: int = 1
    """what a matrix' rows have to be a multiple of"""
    columns: int = 1
    """the same of its columns"""
    scales: Callable[[int, int], dict[str, tuple[torch.dtype, tuple[int, ...]]]]
    """(rows, columns) -> last part of a scale's name -> its dtype and shape"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """what comfy-kitchen is asked for"""
    rotated: bool = False
    """whether columns are rotated, in the largest groups that divide them"""
    bits: float
    """of one weight, with its scales"""

    def rotation(self, columns: int) -> int:
        return next(group for group in ROTATIONS if columns % group == 0)

    def settings(self, columns: int) -> dict[str, Any]:
        """What `comfy_quant` says of a matrix."""
        if not self.rotated:
            return {"format": self.format}
        switch = {"convrot": True} if "convrot" in FORMATS[self.format].settings else {}
        return {"format": self.format, **switch, "convrot_groupsize": self.rotation(columns)}

    def quantised(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """ "weight" and its scales, by the last parts of their names."""
        form, settings = FORMATS[self.format], self.settings(weight.shape[1])
        found = kitchen(f"--store in the format {self.format}").QuantizedTensor.from_float(
            weight.float(),
            form.layout,
            **self.options,
            **{n: settings[n] for n in form.settings if n in settings},
        )
        return found.state_dict("weight")

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """The numbers that the stored matrix stands for, float32."""
        scales = self.quantised(weight)
        return dequantised(
            self.format, scales.pop("weight"), scales, self.settings(weight.shape[1])
        )


def _blocks(size: int) -> Callable[[int, int], tuple[int, int]]:
    """Scales of blocks of `size` columns, in tiles of 128 by 4 as tensor cores read them."""
    return lambda rows, columns: (-(-rows // 128) * 128, -(-columns // (4 * size)) * 4)


def _by_row(rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {"weight_scale": (torch.float32, (rows, 1))}


STORES = {
    "int8": Store(format="int8_tensorwise", scales=_by_row, options={"per_channel": True}, bits=8),
    "int8_convrot": Store(
        format="int8_tensorwise",
        columns=ROTATIONS[-1],
        scales=_by_row,
        options={"per_channel": True},
        rotated=True,
        bits=8,
    ),
    "mxfp8": Store(
        format="mxfp8",
        rows=32,
        columns=32,
        scales=lambda *shape: {"weight_scale": (torch.float8_e8m0fnu, _blocks(32)(*shape))},
        bits=8 + 8 / 32,
    ),
    "nvfp4": Store(
        format="nvfp4",
        rows=16,
        columns=16,
        scales=lambda *shape: {
            "weight_scale": (torch.float8_e4m3fn, _blocks(16)(*shape)),
            "weight_scale_2": (torch.float32, ()),
        },
        bits=4 + 8 / 16,
    ),
    "w4a4": Store(
        format="convrot_w4a4",
        columns=64,
        scales=lambda rows, columns: {"weight_scale": (torch.float32, (rows,))},
        rotated=True,
        bits=4,
    ),
}
"""`--store` -> how matrices are stored"""


def quantised_entries(
    store: str, key: str, shape: Shape, read: Callable[[], torch.Tensor]
) -> list[TensorEntry]:
    """A matrix in ComfyUI's layout: it, its scales and its format, made when they are written.

    key: the matrix' name, "....weight". Raises ValueError, naming it, for a size that the format does
    not divide.
    """
    kind, (rows, columns) = STORES[store], shape
    if rows % kind.rows or columns % kind.columns:
        raise ValueError(
            f"{key} is {rows} x {columns}, which --store {store} cannot hold: it takes multiples of {kind.rows} x "
            f"{kind.columns}; choose another --store"
        )
    kitchen(f"--store {store}")
    parts, module = MadeOnce(lambda: kind.quantised(read())), key.removesuffix("weight")
    form = FORMATS[kind.format]
    stored = {"weight": (form.dtypes[0], (rows, columns // form.packed))}
    stored |= kind.scales(rows, columns)
    said = torch.tensor(list(json_text(kind.settings(columns)).encode()), dtype=torch.uint8)
    return [
        *(
            TensorEntry(module + leaf, dtype, size, lambda leaf=leaf: parts.take(leaf))
            for leaf, (dtype, size) in stored.items()
        ),
        TensorEntry(module + FORMAT_LEAF, said.dtype, tuple(said.shape), lambda: said),
    ]
