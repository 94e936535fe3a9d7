"""A loaded pruned model as the host's Save nodes write it: what runs alone, in the layout of our
exports.

Where whole blocks were dropped and nothing else is changed, blocks are counted from 0, and a host
without this pack loads the file. All others keep the teacher's numbers, carry their plan, and make
such a host stop.
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
from ...ppcl_engine.plan import Interval, PruningPlan, WidthSite
from ...ppcl_engine.system.float8 import FP8_MARK
from .base import Host
from .blocks import OWN_PARTS
from .structure import FileTensors, Structure
from .switching import Parts

# what the host puts between tensors for a model of mixed precision, and cannot write
MIXED = "_quantization_metadata"
# quantised matrices that can be cut: one scale for all of it
WHOLE_SCALE = ("float8_e4m3fn", "float8_e5m2")
STUDENT, PROJECTIONS = (f"{name}." for name in OWN_PARTS)

Tensors = dict[str, torch.Tensor]


def file_of(parts: Parts, state: FileTensors) -> Tensors:
    """By the names that files have, marks included. `state`: of the host's model while it is
    loaded, LoRA in it. Raises ValueError, in one line, for what no file can hold."""
    check(parts, state)
    structure, plan = parts.structure, plan_of(parts)
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
        _counted_anew(structure, plan, layout, tensors)
        if _is_plain(plan)
        else _with_plan(plan, layout, tensors)
    )


def check(parts: Parts, state: FileTensors) -> None:
    if parts.refused:
        raise ValueError(parts.refused)
    if MIXED in state:
        raise ValueError(
            "this version of ComfyUI cannot save a model of mixed precision; load it from a file in bf16, fp16 or scaled fp8, "
            "or update ComfyUI"
        )
    folding = parts.structure.folding
    if folding is not None and folding.form == "table" and not folding.inputs:
        raise ValueError(
            "the modulations of this model are folded into a table of the schedules that it was sampled with, so a file of it "
            "would draw with no other; set fold to off or basis in Load Pruned Model (PPCL), then save"
        )


def plan_of(parts: Parts) -> PruningPlan:
    """Everything in it is on."""
    structure = parts.structure
    if structure.plan is None:
        plan = _plan_of_layout(structure)
    else:
        plan = (
            structure_of(structure.plan, parts.variant) if structure.switchable else structure.plan
        )
    folding = _folding_now(parts)
    return (
        plan.with_parts(config={**plan.config, FOLDING: folding.to_config()}) if folding else plan
    )


def _folding_now(parts: Parts) -> Folding | None:
    """A table may have grown; a LoRA may be in its values, so that no other file can add to it."""
    folding, inputs = parts.structure.folding, parts.folded
    if folding is None or folding.form != "table":
        return folding
    return replace(folding, inputs=len(inputs.timesteps), batches=inputs.batches, mark="")


def _plan_of_layout(structure: Structure) -> PruningPlan:
    """Of a file that carries none: a block stands for those that are missing behind it."""
    layout = structure.layout
    starts = [place.index for place in layout.places]
    ends = [*(start - 1 for start in starts[1:]), layout.num_blocks - 1]
    last = dict(zip(starts, ends, strict=True))
    sites = [site for place in layout.places for site in place.ffn]
    for place in layout.places:
        if place.text_source is not None:
            sites += [
                WidthSite(block=block, kind="text")
                for block in range(place.index, last[place.index] + 1)
            ]
    return PruningPlan(
        architecture=structure.host.engine.name,
        config=structure.config,
        num_blocks=layout.num_blocks,
        fingerprint="",
        intervals=tuple(
            Interval(first=start, last=end) for start, end in last.items() if end > start
        ),
        sites=tuple(sites),
    )


def _running(structure: Structure, layout: Layout, state: FileTensors) -> Tensors:
    """Of a switchable model's tensors those of one variant, by the names that they have when it is
    loaded alone."""
    host, config, places = (
        structure.host,
        structure.config,
        {place.index: place for place in layout.places},
    )
    found = {}
    for name, tensor in state.items():
        where = host.block_of(config, name)
        if where is None:
            found[name] = tensor
        elif (place := places.get(where[0])) and (part := _part_that_runs(host, place, where[1])):
            found[host.prefix(config, place.index) + part] = tensor
    for place in layout.places:
        _cut(structure, place, found)
    return found


def _part_that_runs(host: Host, place: Place, part: str) -> str | None:
    """Its name in a block of this variant alone; None for what does not run there."""
    if part.startswith(PROJECTIONS):
        name, kind, piece, leaf = part.removeprefix(PROJECTIONS).split(".")
        runs = (
            name == place.name
            and kind in place.projections
            and (piece != "step" or place.steps_text)
        )
        return f"{host.engine.comfyui_projections[kind][piece]}.{leaf}" if runs else None
    if part.startswith(STUDENT) != (place.interval is not None):
        return None
    part = part.removeprefix(STUDENT)
    return None if part.startswith(host.vacated(place)) else part


def _cut(structure: Structure, place: Place, tensors: Tensors) -> None:
    """Maps of the block to what its projections leave of them."""
    prefix = structure.prefix(place.index)
    for site in place.ffn:
        for module, cut in structure.host.cuts_at(structure.config, site).items():
            _check_can_be_cut(prefix + module, tensors)
            for name in (f"{prefix}{module}.{leaf}" for leaf in ("weight", "bias")):
                if name in tensors:
                    # newer hosts patch a weight when it is asked for
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
    """A file of the method's authors lists the places that move a group's text on; a plan has one,
    at the end of each group: where the file has none there, a step of zero. Raises ValueError for
    one elsewhere."""
    found = dict(tensors)
    for given, place in zip(structure.layout.places, layout.places, strict=True):
        maps = structure.host.engine.comfyui_projections.get("text", {})
        step, like = (
            structure.prefix(place.index) + maps.get(part, "") for part in ("step", "map")
        )
        if given.steps_text and not place.steps_text and place.last < layout.num_blocks - 1:
            raise ValueError(
                f"this model steps the text inside a text group, at block {place.index}, for which a file with a plan has no place; "
                "it cannot be saved"
            )
        if given.steps_text and not place.steps_text:
            found = {
                name: tensor for name, tensor in found.items() if not name.startswith(f"{step}.")
            }
        if place.steps_text and not given.steps_text:
            found |= {
                f"{step}.{leaf}": torch.zeros_like(found[f"{like}.{leaf}"].to("cpu"))
                for leaf in ("weight", "bias")
            }
    return found


def _without_biases(host: Host, tensors: Tensors) -> Tensors:
    """A table's values hold theirs; the host's maps have one beside them for a LoRA to change."""
    found = dict(tensors)
    for name in modulation_names(tensors, host.engine):
        bias = found.pop(f"{name}.bias").to("cpu")
        found[f"{name}.weight"] = found[f"{name}.weight"].to("cpu") + bias[:, None]
    return found


def _scales_alone(tensors: Tensors) -> Tensors:
    """The host's own mark of scaled fp8, empty, says of any file that it has scales for what comes
    in too."""
    if FP8_MARK not in tensors or any(name.endswith(".scale_input") for name in tensors):
        return {}
    return {FP8_MARK: torch.zeros(2, dtype=tensors[FP8_MARK].dtype)}


def _is_plain(plan: PruningPlan) -> bool:
    """Whether the host's own model, with as many blocks as are left, has a place for every
    tensor."""
    return (
        not plan.sites
        and FOLDING not in plan.config
        and all(i.correction == "none" for i in plan.intervals)
    )


def _counted_anew(
    structure: Structure, plan: PruningPlan, layout: Layout, tensors: Tensors
) -> Tensors:
    host, indices = structure.host, [place.index for place in layout.places]
    prefixes = dict(
        zip(map(structure.prefix, indices), _prefixes_anew(structure, indices), strict=True)
    )
    found = {HINTS_TENSOR: hints_of(plan, indices, host.engine.with_blocks(plan.config, indices))}
    for name, tensor in tensors.items():
        match = host.block_name.match(name)
        found[f"{prefixes[f'{match[1]}.{match[2]}.']}{match[3]}" if match else name] = tensor
    return found


def _prefixes_anew(structure: Structure, indices: Iterable[int]) -> list[str]:
    """Of the blocks with these indices, counted from 0 in each of the host's lists."""
    ranges = structure.host.ranges(structure.config).items()
    kept = [(name, [index for index in indices if index in there]) for name, there in ranges]
    return [f"{name}.{number}." for name, there in kept for number in range(len(there))]


def _with_plan(plan: PruningPlan, layout: Layout, tensors: Tensors) -> Tensors:
    found = {**tensors, STRUCTURE_TENSOR: as_tensor(plan.to_json())}
    if guard := guard_name(plan, layout):
        found[guard] = torch.zeros(GUARD_SHAPE, dtype=torch.uint8)
    return found
