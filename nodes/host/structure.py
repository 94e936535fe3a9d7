"""What a file's tensors say about the model in it: which block stands where, by the teacher's
indices.

Three kinds: our own files carry their plan as a tensor; files of the method's authors say it by
their names and count from 0; a plain model of a size that the host does not know says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ...ppcl_engine.architectures import Architecture
from ...ppcl_engine.architectures.base import modulation_names
from ...ppcl_engine.architectures.folded import Folding, folding_of
from ...ppcl_engine.models.layout import Layout, Place, full_layout, layout_of
from ...ppcl_engine.models.released import published_intervals, released_layout, teacher_indices
from ...ppcl_engine.models.standalone import GUARD_SHAPE
from ...ppcl_engine.models.stored_layout import HINTS_TENSOR, STRUCTURE_TENSOR, object_in, text_in
from ...ppcl_engine.models.weights import parts_in, usual_name
from ...ppcl_engine.plan import PruningPlan, plan_from_json
from ...ppcl_engine.system.two_of_four import is_compressed
from .base import Host

MAX_BLOCKS = 256  # an order above any model: a hostile file must not make the host build a million
AXES = "axes_dims_rope"
STUDENT = "student."

FileTensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Structure:
    """layout: what is built. config: the engine's, of the whole model. plan: of our own files.
    switchable: teacher's blocks and all students are there. names: stored name -> name in the
    host's model, where they differ; None: nothing reads it.
    legacy: names of text projections that are stored as P instead of P - 1. folding: what stands
    for the modulations, where they are folded."""

    host: Host
    layout: Layout
    config: dict
    plan: PruningPlan | None = None
    switchable: bool = False
    names: dict[str, str | None] = field(default_factory=dict)
    legacy: frozenset[str] = frozenset()
    folding: Folding | None = None

    def prefix(self, index: int) -> str:
        return self.host.prefix(self.config, index)

    def block(self, transformer: nn.Module, index: int) -> nn.Module:
        return transformer.get_submodule(self.prefix(index).rstrip("."))

    def renamed(self, tensors: FileTensors) -> dict[str, torch.Tensor]:
        """The tensors by the names of the model that is built."""
        found = {}
        for name, tensor in ((shown(name), tensor) for name, tensor in tensors.items()):
            new = self.names.get(name, name)
            if new is not None and not is_surrounding(name) and tuple(tensor.shape) != GUARD_SHAPE:
                new = usual_name(self.host.engine, new)
                found[new] = _without_identity(tensor) if name in self.legacy else tensor
        return found | self._zero_biases(found)

    def _zero_biases(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A table's values hold theirs; a map has one for a LoRA to change."""
        if self.folding is None or self.folding.form != "table":
            return {}
        found = {
            name: tensors[f"{name}.weight"] for name in modulation_names(tensors, self.host.engine)
        }
        return {f"{name}.bias": table.new_zeros(len(table)) for name, table in found.items()}


def hidden(tensors: FileTensors) -> dict[str, torch.Tensor]:
    """For the host's loader: students by names outside of all blocks, since it reads numbers of
    blocks in names and knows no other parts of a block than its own."""
    return {
        f"{STUDENT}{name.replace(f'.{STUDENT}', '.', 1)}" if f".{STUDENT}" in name else name: tensor
        for name, tensor in tensors.items()
    }


def shown(name: str) -> str:
    """In the model that is built, of a name that may be hidden."""
    if not name.startswith(STUDENT):
        return name
    blocks, number, part = name.removeprefix(STUDENT).split(".", 2)
    return f"{blocks}.{number}.{STUDENT}{part}"


def is_surrounding(name: str) -> bool:
    """Not of the transformer: our own marks, and the tables that the bundled teacher brings
    along."""
    return name.startswith(("ppcl_", "text_encoder.", "vae."))


def _without_identity(tensor: torch.Tensor) -> torch.Tensor:
    if hasattr(tensor, "changed"):  # a matrix of few bits
        return tensor.changed(_without_identity)
    return (tensor.float() - torch.eye(len(tensor), device=tensor.device)).to(tensor.dtype)


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


def config_of(host: Host, tensors: FileTensors, known: Mapping | None = None) -> dict:
    """The engine's, from shapes and marks; how many blocks there are, how rotary axes are shared,
    and what else no shape tells, from `known` where it says."""
    shapes, marks = engine_shapes(host.engine, tensors), host.engine.marks
    found = host.engine.infer_config(
        shapes.__getitem__, [*shapes, *(mark for mark in marks if mark in tensors)]
    )
    entries = (*(blocks.depth for blocks in host.lists), AXES, *marks.values(), *host.told)
    told = {key: known[key] for key in entries if known and key in known}
    axes = told.get(AXES, found.get(AXES))
    if AXES in found and (not isinstance(axes, list) or sum(axes) != found["attention_head_dim"]):
        raise ValueError(
            f"rotary axes {axes} do not make up a head of {found['attention_head_dim']}; is the file whole?"
        )
    return {**found, **told}


def engine_shapes(engine: Architecture, tensors: FileTensors) -> dict[str, tuple[int, ...]]:
    """By diffusers' names, of tensors by the host's."""
    shapes = {}
    for key, part in parts_in(
        engine, (name for name in tensors if name not in engine.marks)
    ).items():
        shape = tuple(tensors[part.name].shape)
        shapes[key] = (
            shape if part.of == 1 else (shape[0] // part.of * len(part.pieces), *shape[1:])
        )
    return shapes


def blocks_in(host: Host, names: Iterable[str]) -> dict[str, list[int]]:
    """List -> the numbers of the blocks that are there."""
    found: dict[str, set[int]] = {blocks.name: set() for blocks in host.lists}
    for match in map(host.block_name.match, names):
        if match:
            found[match[1]].add(int(match[2]))
    return {name: sorted(numbers) for name, numbers in found.items()}


def count_blocks(host: Host, names: Iterable[str]) -> int:
    return sum(map(len, blocks_in(host, names).values()))


def structure_of(host: Host, tensors: FileTensors) -> Structure:
    """Raises ValueError, in one line, for a plan or for lists that make no model."""
    # our loader's: switchable, legacy; a file's too: indices, blocks, config
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
        # nothing else is said of it
        return replace(_released_structure(host, tensors, hints), folding=folding)
    return replace(_released_structure(host, tensors, hints), folding=folding_of(hints))


def checked_plan(host: Host, plan: PruningPlan) -> PruningPlan:
    """What a plan from anywhere must keep to before a model is built by it."""
    if plan.architecture != host.engine.name:
        raise ValueError(
            f"the file's plan is for {plan.architecture}, its tensors are of {host.engine.name}"
        )
    counts = [plan.config.get(blocks.depth) for blocks in host.lists]
    whole = (
        all(type(count) is int and count >= 0 for count in counts)
        and sum(counts) == plan.num_blocks
    )
    if not whole or not 0 < plan.num_blocks <= MAX_BLOCKS:
        raise ValueError(
            f"the file's plan says {plan.num_blocks} blocks and a configuration of {' + '.join(map(str, counts))}; "
            f"both must be the same, 1-{MAX_BLOCKS}"
        )
    for interval in plan.intervals:
        rank = interval.correction
        if rank not in ("none", "affine") and not (str(rank).isdecimal() and 0 < int(rank) <= 4096):
            raise ValueError(
                f"interval {interval.name}: correction {rank!r} is not none, affine or a rank"
            )
    return plan


def _released_structure(host: Host, tensors: FileTensors, hints: dict) -> Structure:
    """Of a file that counts its blocks from 0."""
    there = blocks_in(host, tensors)
    count = sum(map(len, there.values()))
    if (
        any(numbers != list(range(len(numbers))) for numbers in there.values())
        or count > MAX_BLOCKS
    ):
        raise ValueError(
            "the file's blocks are not counted from 0 without gaps, and it carries no plan; is it whole?"
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
        or indices[-1] >= MAX_BLOCKS
        or indices[0] < 0
    ):
        raise ValueError(
            f"the file has {count} blocks, the preset names {len(indices)}; choose the one of this model"
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
    """The teacher's indices of a file's blocks and how many the teacher has; nothing and 0 where
    hints do not say it."""
    indices, blocks = hints.get("indices") or [], hints.get("blocks", 0)
    whole = isinstance(indices, list) and all(type(number) is int for number in [*indices, blocks])
    if not whole or blocks > MAX_BLOCKS:
        raise ValueError(
            "the file's list of its blocks is not readable; export it again, or choose a preset"
        )
    return indices, blocks


def blocks_in_text(text: str) -> list[int]:
    """The same, out of a file's metadata."""
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
    """The authors' files, of models with one list of blocks."""
    parts = (name.split(".") for name in tensors)
    return sorted({int(p[1]) for p in parts if len(p) > 2 and p[1].isdecimal() and p[2] in keys})


def _published(engine: Architecture, config: dict) -> list[int] | None:
    intervals = published_intervals(engine, config)
    return teacher_indices(engine.num_blocks(config), intervals) if intervals else None


def _host_name(
    host: Host, config: dict, whole: dict, name: str, places: tuple[Place, ...], indices: list[int]
):
    """The name in the model that is built; None for what nothing reads."""
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
    return replace(
        place,
        index=indices[place.index],
        ffn=tuple(replace(site, block=indices[site.block]) for site in place.ffn),
        text_source=None if place.text_source is None else indices[place.text_source],
    )


def _read_json(tensors: FileTensors, name: str) -> dict:
    return object_in(tensors[name], "the file") if name in tensors else {}


def text_of(tensor: torch.Tensor) -> str:
    try:
        return text_in(tensor)
    except ValueError:
        raise ValueError("the file's plan is not readable; export it again") from None
