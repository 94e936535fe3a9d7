"""Writes files with folded or unfolded modulations, one tensor at a time; everything else is copied
as stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...architectures.folded import (
    FOLDING,
    Folding,
)
from ...plan import PruningPlan
from ...system.json_text import json_text
from ...system.progress import Progress
from ...system.schemas import read_text
from ...system.tensor_files import TensorEntry, TensorFile, write_tensor_stream
from ..bundle import PLAN_KEY
from ..scales import IGNORED_SUFFIXES
from ..standalone import STRUCTURE_KEY
from ..stored_layout import STRUCTURE_TENSOR
from ..teacher_hashes import TEACHER_KEY, without
from .reading import Original, check_mark

FOLDED_FROM = "ppcl_folded_from"


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What replaces a file's modulations."""

    folding: Folding
    """what the configuration says"""
    dtype: torch.dtype
    """of the maps' weights"""
    maps: dict[str, Callable[[], torch.Tensor]]
    """modulation -> how its new weight is made"""
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """names of the tensors that time embedders get -> the tensors"""


def write_folded(path: Path, original: Original, folded: Folded) -> Path:
    """Copies every other tensor as it is stored, and the biases of a basis; a table's values
    already contain them."""
    replaced = _entries_by_name(original, folded)
    entries = [replaced.get(name, _copied(original, name)) for name in original.stored]
    entries = [entry for entry in entries if entry is not None]
    entries += [_held(original.prefix + name, tensor) for name, tensor in folded.inputs.items()]
    config = {**original.config, FOLDING: folded.folding.to_config()}
    plan = _folded_plan(original, config)
    metadata = {
        **original.metadata,
        "format": "pt",
        FOLDED_FROM: json_text({"mark": original.mark}),
    }
    if original.is_bundle:
        metadata[PLAN_KEY] = plan.to_json()
        if TEACHER_KEY in metadata:
            metadata[TEACHER_KEY] = without(metadata[TEACHER_KEY], original.base_modulations)
    else:
        structure = plan.to_json().encode()
        entries.append(
            _held(
                original.prefix + STRUCTURE_TENSOR, torch.tensor(list(structure), dtype=torch.uint8)
            )
        )
        metadata |= (
            {"config": json_text(config)}
            if original.plan is None
            else {STRUCTURE_KEY: plan.to_json()}
        )
    _write(path, entries, metadata)
    return path


def write_unfolded(path: Path, folded: Original, original: Original) -> Path:
    """Writes the folded file's tensors with the original's modulations and the original's
    metadata."""
    check_is_original(original, folded)
    kept = {name for name in original.stored if not _of_modulation(original, name)}
    if missing := sorted(kept - folded.stored.keys()):
        raise ValueError(
            f"{folded.path} lacks {missing[0]}, which {original.path} has; it was changed since it was folded"
        )
    entries = [_copied(folded if name in kept else original, name) for name in original.stored]
    if original.plan is not None and not original.is_bundle:
        name = original.prefix + STRUCTURE_TENSOR
        entries.append(_held(name, TensorFile(original.path).read(name)))
    described = {} if original.plan is not None else {"config": json_text(original.config)}
    _write(path, entries, original.metadata or {**described, "format": "pt"})
    return path


def check_is_original(original: Original, folded: Original) -> None:
    """Raises ValueError when the folded file was not made from this one."""
    if FOLDED_FROM not in folded.metadata:
        raise ValueError(
            f"{folded.path} was not made by folding a file, so there are no original weights to give back"
        )
    if original.folding is not None:
        raise ValueError(
            f"{original.path} is folded itself; give the file that {folded.path} was folded from"
        )
    check_mark(
        original,
        read_text(_FoldedFrom, folded.metadata[FOLDED_FROM], f"{folded.path}: {FOLDED_FROM}").mark,
        folded.path,
    )


@dataclass(frozen=True)
class _FoldedFrom:
    """What a folded file says about its original."""

    mark: str


def _folded_plan(original: Original, config: dict) -> PruningPlan:
    """For a full model: a plan that replaces nothing, so that a host recognises the file by its
    structure."""
    if original.plan is not None:
        return original.plan.with_parts(config=config)
    architecture = original.architecture
    blocks = architecture.num_blocks(config)
    return PruningPlan(
        architecture=architecture.name, config=config, num_blocks=blocks, fingerprint=""
    )


def _entries_by_name(original: Original, folded: Folded) -> dict[str, TensorEntry | None]:
    """Stored name -> what is written instead; None: nothing."""
    entries: dict[str, TensorEntry | None] = {}
    for name, make in folded.maps.items():
        outputs, key = original.shape(f"{name}.weight")[0], original.prefix + name
        shape = (outputs, folded.folding.columns)
        entries |= {key + ending: None for ending in IGNORED_SUFFIXES}
        entries[f"{key}.weight"] = TensorEntry(f"{key}.weight", folded.dtype, shape, make)
        if folded.folding.form == "table":
            entries[f"{key}.bias"] = None
    return entries


def _of_modulation(original: Original, name: str) -> bool:
    return name.removeprefix(original.prefix).rpartition(".")[0] in original.modulation_set


def _copied(original: Original, name: str) -> TensorEntry:
    file, key = original.stored[name]
    return TensorEntry(name, file.dtype(key), tuple(file.shape(key)), lambda: file.read(key))


def _held(name: str, tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _write(path: Path, entries: list[TensorEntry], metadata: dict[str, str]) -> None:
    bar = Progress(total=len(entries), desc=path.stem, unit="tensor")

    def counted(entry: TensorEntry) -> TensorEntry:
        def read() -> torch.Tensor:
            bar.update()
            return entry.read()

        return TensorEntry(entry.name, entry.dtype, entry.shape, read)

    with bar:
        write_tensor_stream(path, [counted(entry) for entry in entries], metadata)
