"""What a file's tensors say about the model in it: which block stands where, by the teacher's
indices.

There are three kinds. Our own files carry their plan as a tensor. Files of the method's authors tell
it by the names of their tensors, and number their blocks from 0. A plain model of a size that the
host does not know says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from ...ppcl_engine.architectures import Architecture
from ...ppcl_engine.architectures.folded import folding_of
from ...ppcl_engine.models.layout import Layout, Place, full_layout, layout_of
from ...ppcl_engine.models.released import published_intervals, released_layout, teacher_indices
from ...ppcl_engine.models.weights import HINTS_TENSOR, STRUCTURE_TENSOR, object_in
from ...ppcl_engine.plan import plan_from_json
from ...ppcl_engine.system.two_of_four import is_compressed
from .base import Host
from .structure import (
    AXES,
    MOST_HOST_BLOCKS,
    FileTensors,
    Structure,
    blocks_in,
    checked_plan,
    config_of,
    text_of,
)


def is_pruned(host: Host, tensors: FileTensors) -> bool:
    """Whether a file of this architecture is one that the host cannot load by itself."""
    released = (
        tuple(f".{key}.weight" for key in host.engine.released.projections)
        if host.engine.released
        else ()
    )
    if STRUCTURE_TENSOR in tensors or HINTS_TENSOR in tensors or is_compressed(tensors):
        return True
    if any(name.endswith(released) for name in tensors):
        return True
    return not host.is_stock(tensors)


def detected_structure(host: Host, tensors: FileTensors) -> Structure:
    """The structure of the model in a file. Raises ValueError, in one line, where the plan or the
    numbers of blocks do not describe a model."""
    # from our loader: switchable, legacy; from our loader or the file: indices, blocks, config
    hints = _read_json(tensors, HINTS_TENSOR)
    if STRUCTURE_TENSOR not in tensors and HINTS_TENSOR not in tensors:
        host.check_told(tensors)
    if STRUCTURE_TENSOR in tensors:
        plan = checked_plan(
            host, plan_from_json(text_of(tensors[STRUCTURE_TENSOR]), "the file's plan")
        )
        config, folding = config_of(host, tensors, plan.config), folding_of(plan.config)
        if hints.get("switchable"):
            return Structure(
                host, full_layout(plan.num_blocks), config, plan, switchable=True, folding=folding
            )
        if plan.intervals or plan.sites or folding is None:
            return Structure(
                host, layout_of(plan, plan.everything()), config, plan, folding=folding
            )
        # its plan says nothing but that modulations are folded
        return replace(_released_structure(host, tensors, hints), folding=folding)
    return replace(_released_structure(host, tensors, hints), folding=folding_of(hints))


def _released_structure(host: Host, tensors: FileTensors, hints: dict) -> Structure:
    """The structure of a file that numbers its blocks from 0."""
    there = blocks_in(host, tensors)
    count = sum(map(len, there.values()))
    if (
        any(numbers != list(range(len(numbers))) for numbers in there.values())
        or count > MOST_HOST_BLOCKS
    ):
        raise ValueError(
            "the file's blocks are not numbered from 0 without gaps, and it carries no plan; is it complete?"
        )
    known = hints.get("config") or _read_json(tensors, STRUCTURE_TENSOR).get("config") or {}
    config = config_of(
        host,
        tensors,
        {key: known[key] for key in (AXES, *host.engine.marks.values()) if key in known},
    )
    config |= {blocks.depth: len(there[blocks.name]) for blocks in host.lists}
    layout = _released_layout(host.engine, config, tensors)
    indices, blocks = _told_blocks(hints)
    indices = indices or _published(host.engine, config) or list(range(count))
    if (
        len(indices) != count
        or sorted(set(indices)) != indices
        or indices[-1] >= MOST_HOST_BLOCKS
        or indices[0] < 0
    ):
        raise ValueError(
            f"the file has {count} blocks, but the list of their numbers in the full model has {len(indices)} entries, or "
            f"does not rise from 0 to {MOST_HOST_BLOCKS - 1} at most; choose this model's preset, or export the file again"
        )
    blocks = max(blocks, indices[-1] + 1)
    whole = host.spread(config, indices, blocks)
    names = {
        name: _host_name(host, config, whole, name, layout.places, indices)
        for name in tensors
        if host.block_name.match(name)
    }
    places = tuple(_at(place, indices) for place in layout.places)
    legacy = {n for n in names if n.endswith(".txt_proj.weight")} if hints.get("legacy") else ()
    return Structure(
        host, Layout(num_blocks=blocks, places=places), whole, names=names, legacy=frozenset(legacy)
    )


def _told_blocks(hints: Mapping) -> tuple[list[int], int]:
    """(the teacher's index of each of the file's blocks, number of the teacher's blocks); an empty
    list and 0 where the hints do not say so."""
    indices, blocks = hints.get("indices") or [], hints.get("blocks", 0)
    whole = isinstance(indices, list) and all(type(number) is int for number in [*indices, blocks])
    if not whole or blocks > MOST_HOST_BLOCKS:
        raise ValueError(
            "the file's list of its blocks is not readable; export it again, or choose a preset"
        )
    return indices, blocks


def blocks_in_text(text: str) -> list[int]:
    """The teacher's index of each of a file's blocks, from the file's metadata."""
    try:
        numbers = json.loads(text)
    except (ValueError, RecursionError):
        numbers = text
    return _told_blocks({"indices": numbers})[0]


def _released_layout(engine: Architecture, config: dict, tensors: FileTensors) -> Layout:
    if engine.released is None:
        return full_layout(engine.num_blocks(config))
    lists = {kind: _blocks_with(tensors, _keys(engine, kind)) for kind in ("text", "step", "ffn")}
    named = {engine.released.lists[kind]: blocks for kind, blocks in lists.items()}
    return released_layout(engine, {**config, **named}, "the file")


def _keys(engine: Architecture, kind: str) -> tuple[str, ...]:
    wanted = {
        "text": [("text", "map")],
        "step": [("text", "step")],
        "ffn": [("ffn_image", "map"), ("ffn_text", "map")],
    }
    return tuple(key for key, part in engine.released.projections.items() if part in wanted[kind])


def _blocks_with(tensors: FileTensors, keys: tuple[str, ...]) -> list[int]:
    """Numbers of the blocks that have a tensor with one of these keys. Only the authors' files are
    read so, whose models have a single list of blocks."""
    parts = (name.split(".") for name in tensors)
    return sorted({int(p[1]) for p in parts if len(p) > 2 and p[1].isdecimal() and p[2] in keys})


def _published(engine: Architecture, config: dict) -> list[int] | None:
    intervals = published_intervals(engine, config)
    return teacher_indices(engine.num_blocks(config), intervals) if intervals else None


def _host_name(
    host: Host, config: dict, whole: dict, name: str, places: tuple[Place, ...], indices: list[int]
):
    """Name of a released tensor in the model that is built; None for one that nothing reads.
    config: with the file's own numbers of blocks; whole: of the teacher."""
    number, rest = host.block_of(config, name)
    released = host.engine.released
    if released is not None:
        if places[number].text_source is not None and rest.startswith(released.unused):
            return None
        key, _, leaf = rest.rpartition(".")
        if key in released.projections:
            kind, part = released.projections[key]
            rest = f"{host.engine.comfyui_projections[kind][part]}.{leaf}"
    return host.prefix(whole, indices[number]) + rest


def _at(place: Place, indices: list[int]) -> Place:
    """The place by the teacher's indices instead of the file's own numbers."""
    return replace(
        place,
        index=indices[place.index],
        ffn=tuple(replace(site, block=indices[site.block]) for site in place.ffn),
        text_source=None if place.text_source is None else indices[place.text_source],
    )


def _read_json(tensors: FileTensors, name: str) -> dict:
    return object_in(tensors[name], "the file") if name in tensors else {}
