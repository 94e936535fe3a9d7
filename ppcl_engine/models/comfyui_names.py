"""One variant's tensors by ComfyUI's names, as in a standalone: with fused maps, projections where
the host's block has a place for them, and the marks by which ComfyUI recognises a configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch

from ..architectures import Architecture, Part
from .filling import check_shape
from .layout import Layout
from .scales import Quantised, shape_in
from .stored_layout import StoredTensors
from .weights import expected_shapes

CORRECTION = "correction."


def variant_parts(
    architecture: Architecture, config: dict, layout: Layout, keys: Iterable[str]
) -> dict[str, Part]:
    """diffusers' name (teacher indices) -> where the tensor lies by ComfyUI's names.

    A map that was cut holds only the pieces that are left, in order.
    """
    whole = expected_shapes(architecture, config)
    own = _projections(architecture, config, layout, whole)
    prefixes = {
        architecture.block_prefix(config, index): index for index in range(layout.num_blocks)
    }
    parts = {}
    for key in keys:
        module, _, leaf = key.rpartition(".")
        prefix, mark, rest = key.partition(CORRECTION)
        if module in own:
            parts[key] = Part(f"{own[module]}.{leaf}")
        elif mark and prefix in prefixes:
            parts[key] = Part(_prefix(architecture, prefix, whole) + mark + rest)
        else:
            parts[key] = architecture.to_comfyui(key, whole)
    return parts


def check_parts(
    stored: StoredTensors,
    scales: Mapping[str, Quantised],
    parts: Mapping[str, Part],
    shapes: Mapping[str, tuple[int, ...]],
    where: Path,
) -> None:
    """Raises ValueError naming the file and the first tensor that has the wrong shape or does not
    hold numbers."""
    pieces: dict[str, int] = {}
    for part in parts.values():
        pieces[part.name] = pieces.get(part.name, 0) + len(part.pieces)
    for key, part in parts.items():
        file, name = stored[part.name]
        shape = shape_in((file, name), part.name, scales)
        rows, *others = shape or (1,)
        if part.of > 1:
            shape = (rows * len(part.pieces) // pieces[part.name], *others)
        elif part.rows:
            shape = part.shape(shape)
        check_shape(part.name, shape, shapes[key], where)
        if not (file.dtype(name).is_floating_point or part.name in scales):
            raise ValueError(
                f"{where}: {part.name} is {file.dtype(name)}, not numbers of a model; restore it"
            )


def read_part(
    stored: StoredTensors,
    scales: Mapping[str, Quantised],
    parts: Mapping[str, Part],
    key: str,
) -> torch.Tensor:
    """A variant's tensor by diffusers' name; a matrix with a scale is read as its real values, in
    float32.

    stored: ComfyUI's name -> (open file, name in it).
    """
    part = parts[key]
    file, name = stored[part.name]
    if part.of > 1:
        there = sorted(
            piece for other in parts.values() if other.name == part.name for piece in other.pieces
        )
        part = Part(part.name, tuple(there.index(piece) for piece in part.pieces), len(there))
    if part.of == 1:
        tensor = file.read(name)
        tensor = tensor.unflatten(0, (part.rows, -1)) if part.rows else tensor
    else:
        rows = file.shape(name)[0] // part.of
        tensor = torch.cat([file.read(name, rows, piece * rows) for piece in part.pieces])
    return scales[part.name].apply(tensor, part) if part.name in scales else tensor


def _projections(
    architecture: Architecture, config: dict, layout: Layout, whole: Collection[str]
) -> dict[str, str]:
    """Where a projection's linear map stands, by diffusers' name -> by ComfyUI's."""
    names = {}
    for place in layout.places:
        ours = architecture.block_prefix(config, place.index)
        for kind in place.projections:
            theirs = architecture.comfyui_projections[kind]
            parts = architecture.projection_names[kind].items()
            names |= {
                ours + name: _prefix(architecture, ours, whole) + theirs[part]
                for part, name in parts
            }
    return names


def block_prefix_in_comfyui(architecture: Architecture, config: dict, ours: str) -> str:
    """ "transformer_blocks.3." -> "double_blocks.3." """
    return _prefix(architecture, ours, expected_shapes(architecture, config))


def _prefix(architecture: Architecture, ours: str, whole: Collection[str]) -> str:
    """ "transformer_blocks.3." -> "double_blocks.3." """
    key = next(key for key in whole if key.startswith(ours))
    return ".".join(architecture.to_comfyui(key, whole).name.split(".")[:2]) + "."


def marks_of(architecture: Architecture, config: dict) -> dict[str, torch.Tensor]:
    """Empty tensors by which ComfyUI recognises this configuration where shapes do not show it."""
    return {mark: torch.empty(0) for mark, entry in architecture.marks.items() if config.get(entry)}
