"""What a file's tensors say about the model in it: which block stands where, by the teacher's indices.

Three kinds: our own files carry their plan as a tensor; files of the method's authors say it by their names and count
from 0; a plain model of a size that the host does not know says nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from ...ppcl_engine.architectures import architecture_named
from ...ppcl_engine.architectures.folded import Folding, folding_of
from ...ppcl_engine.bundle import STRUCTURE_TENSOR
from ...ppcl_engine.folding_files import modulation_names
from ...ppcl_engine.layout import Layout, Place, full_layout, layout_of
from ...ppcl_engine.plan import PruningPlan, plan_from_json
from ...ppcl_engine.released import published_intervals, released_layout, teacher_indices
from ...ppcl_engine.sparsity.compressed import is_compressed
from ...ppcl_engine.standalone import GUARD_SHAPE

HINTS_TENSOR = "ppcl_hints"
"""What our loader node adds: {"switchable"} of a bundle with its base, {"indices", "legacy"} of other files."""
MAX_BLOCKS = 256  # an order above any model: a hostile file must not make the host build a million
QWEN = architecture_named("qwen_image")
BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
HOST_WIDTH = 24 * 128  # what the host takes for granted

FileTensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Structure:
    """layout: what is built. plan: of our own files. switchable: teacher's blocks and all students are there.
    names: stored name -> name in the host's model, where they differ; None: nothing reads it. legacy: names of text
    projections that are stored as P instead of P - 1. folding: what stands for the modulations, where they are folded."""

    layout: Layout
    plan: PruningPlan | None = None
    switchable: bool = False
    names: dict[str, str | None] = field(default_factory=dict)
    legacy: frozenset[str] = frozenset()
    folding: Folding | None = None

    def renamed(self, tensors: FileTensors) -> dict[str, torch.Tensor]:
        """The tensors by the names of the model that is built."""
        found = {}
        for name, tensor in tensors.items():
            new = self.names.get(name, name)
            if new is not None and not is_surrounding(name) and tuple(tensor.shape) != GUARD_SHAPE:
                found[new] = _without_identity(tensor) if name in self.legacy else tensor
        return found | self._zero_biases(found)

    def _zero_biases(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A table's values hold theirs; a map has one for a LoRA to change."""
        if self.folding is None or self.folding.form != "table":
            return {}
        found = {name: tensors[f"{name}.weight"] for name in modulation_names(tensors, QWEN)}
        return {f"{name}.bias": table.new_zeros(len(table)) for name, table in found.items()}


def is_surrounding(name: str) -> bool:
    """Not of the transformer: our own marks, and the tables that the bundled teacher brings along."""
    return name.startswith(("ppcl_", "text_encoder.", "vae."))


def _without_identity(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.float() - torch.eye(len(tensor), device=tensor.device)).to(tensor.dtype)


def as_tensor(value: dict | str) -> torch.Tensor:
    text = value if isinstance(value, str) else json.dumps(value)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def is_pruned(tensors: FileTensors) -> bool:
    """Whether a Qwen-Image file is one that the host cannot load by itself."""
    released = tuple(f".{key}.weight" for key in QWEN.released.projections)
    if STRUCTURE_TENSOR in tensors or HINTS_TENSOR in tensors or is_compressed(tensors):
        return True
    if any(name.endswith(released) for name in tensors):
        return True
    return tensors["img_in.weight"].shape[0] != HOST_WIDTH


def sizes_of(tensors: FileTensors) -> dict:
    """Arguments of the host's class: from our own plan or hints where they are there, else from shapes alone."""
    known = _read_json(tensors, HINTS_TENSOR).get("config") or _read_json(tensors, STRUCTURE_TENSOR).get("config")
    found = QWEN.infer_config(
        lambda key: tuple(tensors[key].shape), [name for name in tensors if name not in QWEN.marks]
    )
    axes = (known or {}).get("axes_dims_rope", found["axes_dims_rope"])
    if not isinstance(axes, list) or sum(axes) != found["attention_head_dim"]:
        raise ValueError(
            f"rotary axes {axes} do not make up a head of {found['attention_head_dim']}; is the file whole?"
        )
    return {**found, "axes_dims_rope": axes}


def block_numbers(names: Iterable[str]) -> list[int]:
    return sorted({int(match[1]) for name in names if (match := BLOCK.match(name))})


def structure_of(tensors: FileTensors) -> Structure:
    """Raises ValueError, in one line, for a plan or for lists that make no model."""
    hints = _read_json(tensors, HINTS_TENSOR)
    if STRUCTURE_TENSOR in tensors:
        plan = checked_plan(plan_from_json(text_of(tensors[STRUCTURE_TENSOR]), "the file's plan"))
        folding = folding_of(plan.config)
        if hints.get("switchable"):
            return Structure(full_layout(plan.num_blocks), plan, switchable=True, folding=folding)
        if plan.intervals or plan.sites or folding is None:
            return Structure(layout_of(plan, plan.everything()), plan, folding=folding)
        return replace(_released_structure(tensors, hints), folding=folding)  # a full model, nothing else is said of it
    return replace(_released_structure(tensors, hints), folding=folding_of(hints))


def checked_plan(plan: PruningPlan) -> PruningPlan:
    """What a plan from anywhere must keep to before a model is built by it."""
    if plan.architecture != QWEN.name:
        raise ValueError(f"the file's plan is for {plan.architecture}; known here: {QWEN.name}")
    if not 0 < plan.num_blocks <= MAX_BLOCKS or plan.config.get("num_layers") != plan.num_blocks:
        raise ValueError(
            f"the file's plan says {plan.num_blocks} blocks and a configuration of {plan.config.get('num_layers')}; "
            f"both must be the same, 1-{MAX_BLOCKS}"
        )
    for interval in plan.intervals:
        rank = interval.correction
        if rank not in ("none", "affine") and not (str(rank).isdecimal() and 0 < int(rank) <= 4096):
            raise ValueError(f"interval {interval.name}: correction {rank!r} is not none, affine or a rank")
    return plan


def _released_structure(tensors: FileTensors, hints: dict) -> Structure:
    """Of a file that counts its blocks from 0."""
    count = len(block_numbers(tensors))
    if block_numbers(tensors) != list(range(count)) or count > MAX_BLOCKS:
        raise ValueError("the file's blocks are not counted from 0 without gaps, and it carries no plan; is it whole?")
    lists = {kind: _blocks_with(tensors, _keys(kind)) for kind in ("text", "step", "ffn")}
    config = {**sizes_of(tensors), "num_layers": count}
    named = {QWEN.released.lists[kind]: blocks for kind, blocks in lists.items()}
    layout = released_layout(QWEN, {**config, **named}, "the file")
    indices = hints.get("indices") or _published(config) or list(range(count))
    if len(indices) != count or sorted(set(indices)) != indices or indices[-1] >= MAX_BLOCKS or indices[0] < 0:
        raise ValueError(f"the file has {count} blocks, the preset names {len(indices)}; choose the one of this model")
    names = {name: _host_name(name, layout.places, indices) for name in tensors if BLOCK.match(name)}
    blocks = max(hints.get("blocks", 0), indices[-1] + 1)
    places = tuple(_at(place, indices) for place in layout.places)
    legacy = {n for n in names if n.endswith(".txt_proj.weight")} if hints.get("legacy") else ()
    return Structure(Layout(num_blocks=blocks, places=places), names=names, legacy=frozenset(legacy))


def _keys(kind: str) -> tuple[str, ...]:
    wanted = {"text": [("text", "map")], "step": [("text", "step")], "ffn": [("ffn_image", "map"), ("ffn_text", "map")]}
    return tuple(key for key, part in QWEN.released.projections.items() if part in wanted[kind])


def _blocks_with(tensors: FileTensors, keys: tuple[str, ...]) -> list[int]:
    matches = (BLOCK.match(name) for name in tensors)
    return sorted({int(m[1]) for m in matches if m and m[2].split(".")[0] in keys})


def _published(config: dict) -> list[int] | None:
    intervals = published_intervals(QWEN, config)
    return teacher_indices(config["num_layers"], intervals) if intervals else None


def _host_name(name: str, places: tuple[Place, ...], indices: list[int]) -> str | None:
    number, rest = BLOCK.match(name).groups()
    place = places[int(number)]
    if place.text_source is not None and rest.startswith(QWEN.released.unused):
        return None
    key, _, leaf = rest.rpartition(".")
    if key in QWEN.released.projections:
        kind, part = QWEN.released.projections[key]
        key = QWEN.projection_names[kind][part]
    return f"transformer_blocks.{indices[int(number)]}.{key}.{leaf}"


def _at(place: Place, indices: list[int]) -> Place:
    return replace(
        place,
        index=indices[place.index],
        ffn=tuple(replace(site, block=indices[site.block]) for site in place.ffn),
        text_source=None if place.text_source is None else indices[place.text_source],
    )


def _read_json(tensors: FileTensors, name: str) -> dict:
    return json.loads(text_of(tensors[name])) if name in tensors else {}


def text_of(tensor: torch.Tensor) -> str:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise ValueError("the file's plan is not readable; export it again")
    try:
        return bytes(tensor.tolist()).decode()
    except UnicodeDecodeError:
        raise ValueError("the file's plan is not readable; export it again") from None
