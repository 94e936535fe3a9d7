"""2:4 on disk: of every four neighbours, two values and their positions; 9/16 of the bytes in 16
bits.

A matrix [rows, columns] becomes `<name>.values_2_4` [rows, columns / 2] and `<name>.indices_2_4`
[rows, columns / 8 rounded up], uint8: two bits an index, four indices a byte, the first in the
lowest bits. Reading gives the identical matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

VALUES, INDICES = ".values_2_4", ".indices_2_4"


def compress(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, indices). Raises ValueError when a group has more than two non-zero numbers."""
    rows, columns = dense.shape
    groups = dense.reshape(rows, columns // 4, 4)
    filled = groups != 0
    if int(filled.sum(-1).max()) > 2:
        raise ValueError(
            "a group of four has more than two weights that are not zero, so it is not 2:4"
        )
    order = (~filled).to(torch.uint8).argsort(dim=-1, stable=True)[..., :2].sort(dim=-1).values
    return groups.gather(-1, order).reshape(rows, columns // 2), _packed(order.reshape(rows, -1))


def decompress(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    rows, kept = values.shape
    order = _unpacked(indices, kept).reshape(rows, kept // 2, 2)
    dense = torch.zeros(rows, kept // 2, 4, dtype=_movable(values.dtype), device=values.device)
    return (
        dense.scatter_(-1, order, values.view(dense.dtype).reshape(rows, -1, 2))
        .view(values.dtype)
        .flatten(1)
    )


def _movable(dtype: torch.dtype) -> torch.dtype:
    """An integer dtype of the same width: moving it changes no bit, and works for every dtype."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def _packed(indices: torch.Tensor) -> torch.Tensor:
    """[rows, n] of 0..3 -> [rows, n / 4 rounded up]"""
    fours = torch.nn.functional.pad(indices.to(torch.uint8), (0, -indices.shape[1] % 4)).reshape(
        len(indices), -1, 4
    )
    return fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6


def _unpacked(packed: torch.Tensor, count: int) -> torch.Tensor:
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts & 3).flatten(1)[:, :count].long()


def is_compressed(tensors: Iterable[str]) -> bool:
    return any(name.endswith(VALUES) for name in tensors)


def decompressed(
    tensors: Mapping[str, torch.Tensor], shapes_only: bool = False
) -> Mapping[str, torch.Tensor]:
    """Matrices that another reader left compressed, as dense ones (shapes_only: on the meta
    device); everything else unchanged."""
    if not is_compressed(tensors):
        return tensors
    dense = {
        name: tensor for name, tensor in tensors.items() if not name.endswith((VALUES, INDICES))
    }
    for name in [name.removesuffix(VALUES) for name in tensors if name.endswith(VALUES)]:
        values = tensors[name + VALUES]
        if shapes_only:
            dense[name] = values.new_empty(len(values), 2 * values.shape[1], device="meta")
        else:
            dense[name] = decompress(values, tensors[name + INDICES])
    return dense


def compressed_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of values and indices."""
    rows, columns = shape
    return (rows, columns // 2), (rows, -(-columns // 8))


def dense_entries(entries: dict[str, dict], where: object) -> dict[str, dict]:
    """A safetensors header in which compressed matrices have their own names: `shape` is the dense
    shape, `parts` are the two entries in the file.

    Raises ValueError for values without indices, and for indices of the wrong shape.
    """
    names = [name.removesuffix(VALUES) for name in entries if name.endswith(VALUES)]
    parts = {n: (entries[n + VALUES], entries.get(n + INDICES)) for n in names}
    for name, (values, indices) in parts.items():
        rows, kept = values["shape"] if len(values["shape"]) == 2 else (0, 1)
        expected = [*compressed_shapes((rows, 2 * kept))[1]]
        if kept % 2 or indices is None or indices["dtype"] != "U8" or indices["shape"] != expected:
            raise ValueError(
                f"{where}: {name} is compressed as 2:4, but its indices are missing or of another shape; copy or "
                "download the file again"
            )
    stored = {name + ending for name in parts for ending in (VALUES, INDICES)}
    dense = {
        name: entry for name, entry in entries.items() if name not in stored and name not in parts
    }
    for name, (values, indices) in parts.items():
        shape = [values["shape"][0], 2 * values["shape"][1]]
        dense[name] = {"dtype": values["dtype"], "shape": shape, "parts": (values, indices)}
    return dense
