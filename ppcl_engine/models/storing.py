"""How a model's matrices are stored in a file that is written: in which of `--store`'s precisions,
which of them, and in which layouts."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from ..system.few_bits import STORES, quantised_entries
from ..system.float8 import scaled_entries
from ..system.gguf_files import block_columns, gguf_rounded, gguf_size
from ..system.machine import DTYPES
from ..system.tensor_files import TensorEntry

FP8_STORE = "float8"
GGUF_STORES = {
    "float32": ("F32", 32),
    "bfloat16": ("BF16", 16),
    "q8_0": ("Q8_0", 8.5),
    "q5_1": ("Q5_1", 6),
    "q5_0": ("Q5_0", 5.5),
    "q4_1": ("Q4_1", 5),
    "q4_0": ("Q4_0", 4.5),
}
"""`--store` -> GGUF's name of the type of a block's matrices, bits of a weight in it"""
MIXED = "mixed"
"""`--store` for a format of its own for each matrix"""
CHOICES = {
    "comfyui": ("bfloat16", "mxfp8", "int8_convrot", "int8", "nvfp4"),
    "ppcl": ("bfloat16", "mxfp8", "int8_convrot", "int8", "nvfp4"),
    "gguf": ("bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
}
"""layout -> what `mixed` chooses from. Not w4a4: hosts round its inputs to four bits too, an error
that nobody sees in the weights. Not float8: a file is in it as a whole."""
SHARED_SCALES = {
    "mxfp8": 32,
    "nvfp4": 16,
    **dict.fromkeys(("q8_0", "q5_1", "q5_0", "q4_1", "q4_0"), 32),
}
"""`--store` -> how many neighbouring columns of a row share a scale, where the others do not count"""
LAYOUTS = (
    (tuple(DTYPES), ("bundle", "comfyui", "diffusers", "ppcl", "gguf")),
    ((FP8_STORE,), ("comfyui",)),
    (tuple(STORES), ("comfyui", "ppcl", "bundle")),
    (tuple(GGUF_STORES), ("gguf",)),
    ((MIXED,), tuple(CHOICES)),
)
"""stores -> the layouts that have them"""
IN_BLOCKS = re.compile(
    r"(?:^|\.)(?<!fusion\.)(?:\w*blocks|layers)\.[0-9]+\.|^(?:students|projections)\."
)
CORRECTION = re.compile(r"(?:^|\.)correction\.")
PLAIN_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
BITS = {
    **{name: bits for name, (_, bits) in GGUF_STORES.items()},
    **{name: kind.bits for name, kind in STORES.items()},
    FP8_STORE: 8,
    **PLAIN_BITS,
    MIXED: 16,
}
"""`--store` -> bits of a weight; of `mixed`, the most"""


def check_store(layout: str, store: str) -> None:
    """Raises ValueError for a precision that a file of this layout cannot have."""
    known = [name for stores, layouts in LAYOUTS if store in stores for name in layouts]
    if layout not in known:
        raise ValueError(
            f"--store {store} is not for --layout {layout}; use --layout {' or '.join(known)}"
        )


def check_bits(layout: str, store: str, budget_gb: float, refit: bool) -> None:
    """Raises ValueError for settings of chosen formats that do not belong together."""
    if store == MIXED and not budget_gb:
        raise ValueError("--store mixed needs --budget-gb: the most GB that the file may have")
    if budget_gb and store != MIXED:
        raise ValueError(
            f"--budget-gb {budget_gb:g} has nothing to choose with --store {store}; use --store mixed, or leave "
            "--budget-gb out"
        )
    if refit and layout == "bundle":
        raise ValueError(
            "--refit is not for --layout bundle, whose parts stand in several variants; use --layout comfyui, ppcl or gguf"
        )
    if refit and store not in (MIXED, *SHARED_SCALES):
        raise ValueError(
            f"--refit does nothing for --store {store}, which has no scales of blocks of columns; use --store mixed, "
            f"{', '.join(SHARED_SCALES)}, or leave --refit out"
        )


def stored_dtype(store: str) -> torch.dtype:
    """What tensors are written in that are no matrices, or that stay as they are."""
    return DTYPES.get(store, torch.bfloat16)


def is_block_matrix(key: str, shape: tuple[int, ...]) -> bool:
    """Whether it is the weight of a linear map in a block, a student or a projection. All others stay
    in 16 bits: a hundredth of the weights, which every block's input and the output go through."""
    return (
        len(shape) == 2
        and key.endswith(".weight")
        and IN_BLOCKS.search(key) is not None
        and CORRECTION.search(key) is None
    )


def stored_entries(
    key: str, shape: tuple[int, ...], read: Callable[[], torch.Tensor], store: str
) -> list[TensorEntry]:
    """A tensor as it is written: itself, or a quantised matrix with its scales."""
    if store in STORES and is_block_matrix(key, shape):
        return quantised_entries(store, key, (shape[0], shape[1]), read)
    if store == FP8_STORE and _is_linear(key, shape):
        return scaled_entries(key, shape, read)
    return [TensorEntry(key, stored_dtype(store), shape, read)]


def gguf_entry(
    key: str, shape: tuple[int, ...], read: Callable[[], torch.Tensor], store: str
) -> tuple[str, TensorEntry]:
    """(GGUF's name of a type, the tensor). Types of blocks are for the blocks' matrices; other
    matrices are BF16, vectors F32.

    Raises ValueError, naming it, for a matrix whose columns the type's blocks do not divide.
    """
    kind, _ = GGUF_STORES[store]
    entry = TensorEntry(key, torch.float32, shape, read)
    if not is_block_matrix(key, shape):
        plain = "BF16" if len(shape) > 1 and _is_linear(key, shape) else "F32"
        return (kind if store == "float32" else plain), entry
    if shape[1] % (block := block_columns(kind)):
        raise ValueError(
            f"{key} has {shape[1]} columns, which --store {store} cannot hold: it takes multiples of {block}; "
            "choose another --store"
        )
    return kind, entry


def fitting_stores(layout: str, shape: tuple[int, ...]) -> list[str]:
    """The formats that `mixed` chooses from and that can hold a block's matrix of this shape."""
    return [store for store in CHOICES[layout] if _fits(store, *shape)]


def _fits(store: str, rows: int, columns: int) -> bool:
    if store in STORES:
        return rows % STORES[store].rows == 0 and columns % STORES[store].columns == 0
    return store in DTYPES or columns % block_columns(GGUF_STORES[store][0]) == 0


def stored_size(layout: str, key: str, shape: tuple[int, ...], store: str) -> int:
    """Bytes that a tensor takes in a file, with its scales and without its part of the header."""

    def unread() -> torch.Tensor:
        raise AssertionError(key)

    if layout == "gguf":
        kind, entry = gguf_entry(key, shape, unread, store)
        return gguf_size(kind, entry.shape)
    return sum(entry.size for entry in stored_entries(key, shape, unread, store))


def as_stored(store: str, weight: torch.Tensor) -> torch.Tensor:
    """The numbers that a matrix stands for when it is stored, float32."""
    if store in STORES:
        return STORES[store].rounded(weight)
    if store in DTYPES:
        return weight.to(DTYPES[store]).float()
    return gguf_rounded(GGUF_STORES[store][0], weight)


def _is_linear(key: str, shape: tuple[int, ...]) -> bool:
    """Whether it is a linear map's weight: all other tensors of two dimensions are embedding
    tables."""
    return len(shape) == 2 and key.endswith(".weight") and "embedding.weight" not in key
