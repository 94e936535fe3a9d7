"""A loaded pruned model as the host's Save nodes write it: only what runs, in the layout of our own
exports.

Where whole blocks were dropped and nothing else was changed, blocks are numbered from 0, and a
ComfyUI without this pack can load the file. All other files keep the teacher's numbers, carry their
plan, and are refused by a ComfyUI without this pack.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from ...ppcl_engine.architectures.base import modulation_names
from ...ppcl_engine.architectures.folded import FOLDING, Folding
from ...ppcl_engine.models.comfyui_names import marks_of
from ...ppcl_engine.models.layout import Layout, Place, layout_of
from ...ppcl_engine.models.standalone import GUARD_SHAPE, guard_name, hints_of, structure_of
from ...ppcl_engine.models.stored_layout import HINTS_TENSOR, STRUCTURE_TENSOR, as_tensor
from ...ppcl_engine.models.weights import usual_name
from ...ppcl_engine.plan import PruningPlan
from ...ppcl_engine.system.float8 import FP8_MARK
from .base import Host
from .blocks import OWN_PARTS
from .structure import FileTensors, Structure, plan_of_layout
from .switching import PrunedState

# an entry that is not a tensor: the host puts it there for mixed precision, and cannot write it
MIXED = "_quantization_metadata"
# formats whose matrices can be cut: one scale for the whole matrix
WHOLE_SCALE = ("float8_e4m3fn", "float8_e5m2")
STUDENT, PROJECTIONS = (f"{name}." for name in OWN_PARTS)

Tensors = dict[str, torch.Tensor]


def file_of(pruned: PrunedState, state: FileTensors) -> Tensors:
    """The tensors of a file, marks included, from `state`: the tensors of the host's model while it
    is loaded, with any LoRA in them. Raises ValueError, in one line, for what no file can hold."""
    check(pruned, state)
    structure, plan = pruned.structure, plan_of(pruned)
    host, layout = structure.host, layout_of(plan, plan.everything())
    tensors = _running(structure, layout, state) if structure.switchable else dict(state)
    if structure.plan is None:
        tensors = _with_steps(structure, layout, tensors)
    if structure.folding and structure.folding.form == "table":
        tensors = _without_biases(host, tensors)
    tensors = {
        usual_name(host.engine, n): t for n, t in tensors.items() if n not in host.engine.marks
    }
    tensors |= marks_of(host.engine, plan.config) | _scales_alone(tensors)
    return (
        _numbered_from_0(structure, plan, layout, tensors)
        if _is_plain(plan)
        else _with_plan(plan, layout, tensors)
    )


def check(pruned: PrunedState, state: FileTensors) -> None:
    """Raises ValueError where this model cannot be saved as it is."""
    if pruned.refused:
        raise ValueError(pruned.refused)
    if MIXED in state:
        raise ValueError(
            "this version of ComfyUI cannot save a model of mixed precision; load it from a file in bf16, fp16 or scaled fp8, "
            "or update ComfyUI"
        )
    folding = pruned.structure.folding
    if folding is not None and folding.form == "table" and not folding.inputs:
        raise ValueError(
            "the modulations of this model are folded into a table of the schedules that it was sampled with, so a saved "
            "file would work with no other schedule; set fold to off or basis in Load Pruned Model (PPCL), then save"
        )


def plan_of(pruned: PrunedState) -> PruningPlan:
    """The plan of what runs: a file of it has all its parts switched on."""
    structure = pruned.structure
    if structure.plan is None:
        plan = plan_of_layout(structure.host, structure.config, structure.layout)
    else:
        plan = (
            structure_of(structure.plan, pruned.variant) if structure.switchable else structure.plan
        )
    folding = _folding_now(pruned)
    return (
        plan.with_parts(config={**plan.config, FOLDING: folding.to_config()}) if folding else plan
    )


def _folding_now(pruned: PrunedState) -> Folding | None:
    """The folding as it is now: a table may have grown. It loses its mark, since a LoRA may be in its
    values, and values of the original file must not be added to those."""
    folding, inputs = pruned.structure.folding, pruned.folded
    if folding is None or folding.form != "table":
        return folding
    return replace(folding, inputs=len(inputs.timesteps), batches=inputs.batches, mark="")


def _running(structure: Structure, layout: Layout, state: FileTensors) -> Tensors:
    """The tensors of one variant of a switchable model, by the names they have when that variant is
    loaded alone."""
    host, config, places = (
        structure.host,
        structure.config,
        {place.index: place for place in layout.places},
    )
    running = {}
    for name, tensor in state.items():
        where = host.block_of(config, name)
        if where is None:
            running[name] = tensor
        elif (place := places.get(where[0])) and (rest := _name_alone(host, place, where[1])):
            running[host.prefix(config, place.index) + rest] = tensor
    for place in layout.places:
        _cut(structure, place, running)
    return running


def _name_alone(host: Host, place: Place, name: str) -> str | None:
    """What a block's tensor is called in a block that has this variant alone; None if it does not
    run there."""
    if name.startswith(PROJECTIONS):
        place_name, kind, part, leaf = name.removeprefix(PROJECTIONS).split(".")
        runs = (
            place_name == place.name
            and kind in place.projections
            and (part != "step" or place.steps_text)
        )
        return f"{host.engine.comfyui_projections[kind][part]}.{leaf}" if runs else None
    if name.startswith(STUDENT) != (place.interval is not None):
        return None
    name = name.removeprefix(STUDENT)
    return None if name.startswith(host.vacated(place)) else name


def _cut(structure: Structure, place: Place, tensors: Tensors) -> None:
    """Cuts maps of the place's block to what its projections leave of them."""
    prefix = structure.prefix(place.index)
    for site in place.ffn:
        for module, cut in structure.host.cuts_at(structure.config, site).items():
            _check_can_be_cut(prefix + module, tensors)
            for name in (f"{prefix}{module}.{leaf}" for leaf in ("weight", "bias")):
                if name in tensors:
                    # newer hosts apply a LoRA to a weight only when it is moved to the CPU
                    tensors[name] = cut.of(tensors[name].to("cpu"))


def _check_can_be_cut(module: str, tensors: Tensors) -> None:
    if (quantised := tensors.get(f"{module}.comfy_quant")) is None:
        return
    text = bytes(quantised.to("cpu").tolist()).decode()
    if not any(f'"{name}"' in text for name in WHOLE_SCALE):
        raise ValueError(
            f"{module} is quantised in a form that cannot be cut ({text}); set switchable to off in Load Pruned Model (PPCL), "
            "then save"
        )


def _with_steps(structure: Structure, layout: Layout, tensors: Tensors) -> Tensors:
    """The tensors of a model whose file had no plan, with the text steps that a plan implies.

    A plan has one text step, at the end of each text group; the authors' files list where theirs
    are. A step of zeros is added where the file has none. Raises ValueError for a step elsewhere,
    which a plan cannot describe.
    """
    stepped = dict(tensors)
    for given, place in zip(structure.layout.places, layout.places, strict=True):
        maps = structure.host.engine.comfyui_projections.get("text", {})
        step, like = (
            structure.prefix(place.index) + maps.get(part, "") for part in ("step", "map")
        )
        if given.steps_text and not place.steps_text and place.last < layout.num_blocks - 1:
            raise ValueError(
                f"this model moves the text on inside a text group, at block {place.index}, which a file with a plan cannot describe; "
                "it cannot be saved"
            )
        if given.steps_text and not place.steps_text:
            stepped = {
                name: tensor for name, tensor in stepped.items() if not name.startswith(f"{step}.")
            }
        if place.steps_text and not given.steps_text:
            stepped |= {
                f"{step}.{leaf}": torch.zeros_like(stepped[f"{like}.{leaf}"].to("cpu"))
                for leaf in ("weight", "bias")
            }
    return stepped


def _without_biases(host: Host, tensors: Tensors) -> Tensors:
    """The biases of folded tables added to their values, which is where a file has them."""
    joined = dict(tensors)
    for name in modulation_names(tensors, host.engine):
        bias = joined.pop(f"{name}.bias").to("cpu")
        joined[f"{name}.weight"] = joined[f"{name}.weight"].to("cpu") + bias[:, None]
    return joined


def _scales_alone(tensors: Tensors) -> Tensors:
    """The mark of scaled fp8 with two elements, which says that only weights have scales. The host's
    own mark, which is empty, would promise scales for inputs too."""
    if FP8_MARK not in tensors or any(name.endswith(".scale_input") for name in tensors):
        return {}
    return {FP8_MARK: torch.zeros(2, dtype=tensors[FP8_MARK].dtype)}


def _is_plain(plan: PruningPlan) -> bool:
    """Whether the host's own model, with as many blocks as are left, has all these tensors."""
    return (
        not plan.sites
        and FOLDING not in plan.config
        and all(i.correction == "none" for i in plan.intervals)
    )


def _numbered_from_0(
    structure: Structure, plan: PruningPlan, layout: Layout, tensors: Tensors
) -> Tensors:
    host, indices = structure.host, [place.index for place in layout.places]
    prefixes = dict(
        zip(map(structure.prefix, indices), _prefixes_from_0(structure, indices), strict=True)
    )
    renamed = {
        HINTS_TENSOR: hints_of(
            plan.num_blocks, indices, host.engine.with_blocks(plan.config, indices)
        )
    }
    for name, tensor in tensors.items():
        match = host.block_name.match(name)
        renamed[f"{prefixes[f'{match[1]}.{match[2]}.']}{match[3]}" if match else name] = tensor
    return renamed


def _prefixes_from_0(structure: Structure, indices: Iterable[int]) -> list[str]:
    """Prefixes of the blocks with these indices when each of the host's lists is numbered from 0."""
    ranges = structure.host.ranges(structure.config).items()
    kept = [(name, [index for index in indices if index in there]) for name, there in ranges]
    return [f"{name}.{number}." for name, there in kept for number in range(len(there))]


def _with_plan(plan: PruningPlan, layout: Layout, tensors: Tensors) -> Tensors:
    """The tensors with their plan, and a guard that makes a host without this pack refuse them."""
    marked = {**tensors, STRUCTURE_TENSOR: as_tensor(plan.to_json())}
    if guard := guard_name(plan, layout):
        marked[guard] = torch.zeros(GUARD_SHAPE, dtype=torch.uint8)
    return marked
