"""What a loader reads from which file, by the names of the host's model. Knows files and plans, not the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..ppcl_engine.architectures.folded import FOLDING, Folding, folding_of
from ..ppcl_engine.bundle import (
    MAP_KEY,
    STRUCTURE_TENSOR,
    Bundle,
    is_bundle,
    projection_prefix,
    student_prefix,
    tuned_prefix,
)
from ..ppcl_engine.checkpoint import HINTS_TENSOR, as_tensor, fingerprint_of, hints_in, open_layout, parts_in
from ..ppcl_engine.files import TensorFile
from ..ppcl_engine.folding_files import modulation_names
from ..ppcl_engine.layout import Layout, Place, layout_of
from ..ppcl_engine.plan import Interval, PruningPlan, Variant, parse_intervals, plan_from_json
from ..ppcl_engine.quantization import FP8_MARK, FP8_SCALE
from ..ppcl_engine.released import teacher_indices
from ..ppcl_engine.standalone import structure_of
from .host import HOSTS, host_named, host_of
from .host.base import Cut, Host
from .host.formats import float8_of, refuse_foreign
from .host.quantised import FLOAT8, SCALE, Quantised, in_fp8
from .host.structure import blocks_in_text, checked_plan, count_blocks, is_surrounding, text_of
from .modulations import FOLDS, OFF, Fold, MakeFold, Modulations, split
from .stored import Joined, Reader, Stored, in_host_names, metadata_in, places_in

GGUF = ".gguf"
SMALLEST, AUTO, AS_NUMBERED, BY_INTERVALS = "smallest", "auto", "as numbered", "by intervals"
RELEASES = {name: known for host in HOSTS for name, known in host.presets.items()}
PRESETS = (AUTO, AS_NUMBERED, *RELEASES, BY_INTERVALS)

Places = dict[str, Stored | Joined | Quantised]
"""the host's name of a tensor -> where it is"""
OpenBase = Callable[[Path], dict[str, tuple[object, str]]]
"""path -> name of each tensor -> (open file, name in it), as `open_layout` gives them"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a loader node is asked for. Paths are the node pack's own findings, never a widget's text."""

    path: Path
    base: Path | None = None
    variant: str = SMALLEST
    switchable: bool = True
    preset: str = AUTO
    intervals: str = ""
    legacy_text: bool = False
    fold: str = OFF


@dataclass
class Content:
    """tensors: for the host's loader, marks included. metadata: of the file that most of them are from, for it too, but
    what the tensors say by now. bytes_read: of tensors. variant, plan: of a bundle. later: what a table of modulations is
    filled from when a schedule is known."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    bytes_read: int = 0
    plan: PruningPlan | None = None
    variant: Variant | None = None
    notes: tuple[str, ...] = ()
    later: Modulations | None = None


def open_file(path: Path) -> dict[str, tuple[object, str]]:
    return open_layout(path)[0]


def content_of(request: Request, open_base: OpenBase = open_file, make_fold: MakeFold | None = None) -> Content:
    """`open_base` opens the base model's file, and any in GGUF; `make_fold` gives what stands for modulations that are folded
    away. Raises ValueError, in one line, for files that do not belong together or are not what they should be."""
    if request.fold not in FOLDS:
        raise ValueError(f"fold {request.fold!r} is unknown; known: {', '.join(FOLDS)}")
    if request.path.suffix == GGUF:
        return _file_content(request, make_fold, (open_base(request.path), None))
    if is_bundle(request.path):
        return _bundle_content(request, open_base, make_fold)
    return _file_content(request, make_fold, open_layout(request.path))


def _bundle_content(request: Request, open_base: OpenBase, make_fold: MakeFold | None) -> Content:
    bundle, reader = Bundle(request.path), Reader()
    host = host_named(bundle.plan.architecture)
    plan = checked_plan(host, bundle.plan)
    variant = plan.variant(request.variant if request.variant != SMALLEST or _has(plan, SMALLEST) else None)
    if variant.tuned and not request.switchable:
        places = _under(bundle.file, tuned_prefix(variant.name))
        wanted = in_host_names(host, plan.config, places, layout_of(plan, variant).places)
        return _content(host, reader, wanted, structure_of(plan, variant), {}, variant, (), request, make_fold)
    if variant.tuned:
        raise ValueError(f"variant {variant.name!r} is fine-tuned, with weights of its own; set switchable to off")
    if request.base is None:
        raise ValueError(f"{request.path.name} is a bundle: students only; choose as base the model it was made from")
    opened = open_base(request.base)
    stored = base_tensors(host, request.base, opened)
    check_folded_alike(host, plan, stored, request)
    base = in_host_names(host, plan.config, stored)
    if (count := count_blocks(host, base)) != plan.num_blocks:
        raise ValueError(
            f"{request.base.name} has {count} blocks, the bundle's teacher {plan.num_blocks}; choose its own base"
        )
    notes, hints, structure = check_base(host, reader, stored, plan, request.base), {"switchable": True}, plan
    if request.switchable:
        wanted = {**base, **_all_parts(host, bundle)}
    else:
        layout, hints, structure = layout_of(plan, variant), {}, structure_of(plan, variant)
        wanted, notes = _variant_parts(host, base, bundle, layout), (*notes, *layout.notes)
    content = _content(host, reader, wanted, structure, hints, variant, notes, request, make_fold)
    content.metadata = metadata_in(opened)
    return content


def _has(plan: PruningPlan, name: str) -> bool:
    return any(variant.name == name for variant in plan.variants)


def _content(
    host: Host, reader: Reader, wanted: Places, plan, hints: dict, variant: Variant, notes, request, make_fold
) -> Content:
    fold = None
    if request.fold != OFF:
        check_not_folded(folding_of(plan.config), request)
        wanted, modulations = split(host.engine, wanted)
        fold = make_fold(request.fold, modulations)
        plan = plan.with_parts(config={**plan.config, FOLDING: fold.folding.to_config()})
    tensors = reader.read_all(wanted)
    if FP8_MARK in wanted:
        folded = modulation_names(tensors, host.engine) if FOLDING in plan.config else ()
        exact = {f"{name}.weight" for name in folded}
        tensors |= _with_scales(host, tensors, float8_of(wanted[FP8_MARK].read()), exact)
    tensors |= {STRUCTURE_TENSOR: as_tensor(plan.to_json()), HINTS_TENSOR: as_tensor(hints)}
    content = Content(tensors, bytes_read=reader.bytes_read, plan=plan, variant=variant, notes=tuple(notes))
    return _with_fold(content, fold)


def _with_fold(content: Content, fold: Fold | None) -> Content:
    if fold is not None:
        content.tensors |= fold.tensors
        content.bytes_read += fold.bytes_read
        content.notes, content.later = (*content.notes, *fold.notes), fold.later
    return content


def check_not_folded(folding: Folding | None, request: Request) -> None:
    if folding is not None:
        raise ValueError(f"{request.path.name} is folded already ({folding.form}); set fold to off")


def check_folded_alike(host: Host, plan: PruningPlan, base: Places, request: Request) -> None:
    """A folded bundle has students for its own folded base alone."""
    folded_base = any(name.startswith(f"{host.engine.time_embedder}.{FOLDING}.") for name in base)
    if (FOLDING in plan.config) != folded_base:
        which = (request.path.name, request.base.name) if folded_base else (request.base.name, request.path.name)
        raise ValueError(
            f"{which[0]} is not folded, {which[1]} is: they do not belong together; choose both as they were folded "
            "together, or both as they were before"
        )


def _with_scales(
    host: Host, tensors: dict[str, torch.Tensor], dtype: torch.dtype, exact: set[str]
) -> dict[str, torch.Tensor]:
    """Matrices of blocks without a scale (students, projections), as the base keeps its own: fp8 and a scale each.
    `exact`: folded maps, which stay as they are."""
    found = {}
    for name, tensor in tensors.items():
        plain = host.block_name.match(name) and name.endswith(".weight") and tensor.ndim == 2 and name not in exact
        module = name.removesuffix("weight")
        if plain and not tensors.keys() & {module + SCALE, module + FP8_SCALE.removeprefix(".")}:
            found |= {module + leaf: part for leaf, part in in_fp8(tensor, dtype).items()}
    return found


def base_tensors(host: Host, path: Path, stored: dict[str, tuple[object, str]]) -> Places:
    """Of a full model, by its file's names; tables and encoders beside the transformer are left."""
    refuse_foreign(stored, path.name)
    if not host.engine.detect(stored):
        raise ValueError(
            f"{path.name} is not a {host.engine.name} model; choose the model that the bundle was made from"
        )
    return places_in({name: place for name, place in stored.items() if not is_surrounding(name)}, path.name)


def check_base(host: Host, reader: Reader, base: Places, plan: PruningPlan, path: Path) -> tuple[str, ...]:
    """Whether this is the plan's teacher. Quantised values differ, so only names and shapes can be compared, by the
    host when it loads them: then a note says so."""
    marks = (FP8_MARK, *host.engine.marks)
    parts = parts_in(host.engine, (n for n in base if n not in marks))
    shapes = {key: Cut(rows=(part.pieces, part.of)).shape(base[part.name].shape) for key, part in parts.items()}
    vectors = {base[part.name] for key, part in parts.items() if len(shapes[key]) == 1}
    if path.suffix == GGUF or any(stored.dtype in FLOAT8 for stored in vectors):
        return (f"{path.name} is quantised: whether it is the very teacher of this bundle cannot be seen",)

    def read(key: str) -> torch.Tensor:
        part = parts[key]
        return Cut(rows=(part.pieces, part.of)).of(reader.read(base[part.name]))

    plan.check_teacher(host.engine.name, fingerprint_of(host.engine, shapes, read), path.name)
    return ()


def _under(file: TensorFile, prefix: str, name: str = "") -> Places:
    """The file's tensors under a prefix, by names that begin with `name` instead."""
    found = places_in({key: (file, key) for key in file.keys() if key.startswith(prefix)}, file.path.name)
    return {name + key.removeprefix(prefix): place for key, place in found.items()}


def _student(host: Host, bundle: Bundle, interval: Interval) -> Places:
    """By the host's names for a block at its first index."""
    config = bundle.plan.config
    prefix = host.engine.block_prefix(config, interval.first)
    return in_host_names(host, config, _under(bundle.file, student_prefix(interval), prefix))


def _all_parts(host: Host, bundle: Bundle) -> Places:
    """Students and projections by the names that a switchable model gives them."""
    found, config = {}, bundle.plan.config
    for interval in bundle.plan.intervals:
        prefix = host.prefix(config, interval.first)
        parts = _student(host, bundle, interval)
        found |= {f"{prefix}student.{name.removeprefix(prefix)}": place for name, place in parts.items()}
    for name, stored in _under(bundle.file, "projections.").items():
        index = name.split(".")[0].split("-")[0]
        found[f"{host.prefix(config, int(index))}projections.{name}"] = stored
    return found


def _variant_parts(host: Host, base: Places, bundle: Bundle, layout: Layout) -> Places:
    """Just what one variant runs."""
    config, places = bundle.plan.config, {place.index: place for place in layout.places}
    found = {name: stored for name, stored in base.items() if not host.block_name.match(name)}
    blocks = {name: where for name in base if (where := host.block_of(config, name))}
    for name, (index, part) in blocks.items():
        if index in places and not places[index].interval:
            found |= _kept(host, config, places[index], name, part, base[name])
    for place in layout.places:
        prefix = host.prefix(config, place.index)
        if place.interval:
            for name, stored in _student(host, bundle, place.interval).items():
                found |= _kept(host, config, place, name, name.removeprefix(prefix), stored)
        for kind in place.projections:
            for part, stored in _under(bundle.file, projection_prefix(place.name, kind)).items():
                name, leaf = part.split(".")
                if name != "step" or place.steps_text:
                    found[f"{prefix}{host.engine.comfyui_projections[kind][name]}.{leaf}"] = stored
    return found


def _kept(host: Host, config: dict, place: Place, name: str, part: str, stored) -> Places:
    """A block's tensor, if the place's projections leave it; a part of it where they leave a part."""
    if part.startswith(host.vacated(place)):
        return {}
    module, _, leaf = part.rpartition(".")
    for site in place.ffn:
        cut = host.cuts_at(config, site).get(module)
        if cut and leaf in ("weight", "bias"):
            stored = stored.with_cut(cut)
    return {name: stored}


def _file_content(request: Request, make_fold: MakeFold | None, opened: tuple[dict, dict | None]) -> Content:
    """A standalone of ours, a released file or folder, or a plain model, folded or not. opened: as `open_layout` gives it."""
    stored, config = opened[0], opened[1] or hints_in(opened[0]).get("config")
    refuse_foreign(stored, request.path.name)
    host = host_of(stored, request.path.name)
    wanted = places_in({name: place for name, place in stored.items() if _needed(name)}, request.path.name)
    plan = None
    if STRUCTURE_TENSOR in wanted:
        plan = plan_from_json(text_of(wanted[STRUCTURE_TENSOR].read()), request.path.name)
        plan = checked_plan(host, plan)
    wanted = _of_file(host, wanted, plan)
    folding, fold = folding_of(plan.config if plan else config or {}), None
    if request.fold != OFF:
        check_not_folded(folding, request)
        wanted, modulations = split(host.engine, wanted)
        fold = make_fold(request.fold, modulations)
    later = _later(host, request, folding)
    reader = Reader()
    tensors = reader.read_all(wanted)
    if plan is None or not (plan.intervals or plan.sites):
        hints = {"legacy": request.legacy_text, "config": config, **_indices(host, request, stored, wanted)}
        hints |= {FOLDING: fold.folding.to_config()} if fold else {}
        tensors[HINTS_TENSOR] = as_tensor(hints)
    if fold and plan is not None:
        plan = plan.with_parts(config={**plan.config, FOLDING: fold.folding.to_config()})
        tensors[STRUCTURE_TENSOR] = as_tensor(plan.to_json())
    content = _with_fold(Content(tensors, metadata_in(stored), reader.bytes_read), fold)
    content.later = content.later or later
    return content


def _later(host: Host, request: Request, folding: Folding | None) -> Modulations | None:
    """Of a folded table: the file that it was folded from, where that is given as base, for timesteps that it lacks."""
    if request.base is None:
        return None
    if folding is None or folding.form != "table":
        raise ValueError(f"{request.path.name} is no bundle, so it takes no base model; set base to none")
    stored, _ = open_layout(request.base)
    places = places_in({name: place for name, place in stored.items() if not is_surrounding(name)}, request.base.name)
    _, modulations = split(host.engine, places)
    if modulations.mark != folding.mark:
        raise ValueError(
            f"{request.base.name} is another model than {request.path.name} was folded from; choose the very file, or none"
        )
    return modulations


def _of_file(host: Host, stored: Places, plan: PruningPlan | None) -> Places:
    """By the host's names. A file without a plan has no blocks that are not whole, but those that the authors released."""
    if plan is None:
        return in_host_names(host, {blocks.depth: 0 for blocks in host.lists}, stored)
    return in_host_names(host, plan.config, stored, layout_of(plan, plan.everything()).places)


def _needed(name: str) -> bool:
    return not is_surrounding(name) or name == STRUCTURE_TENSOR


def _indices(host: Host, request: Request, stored: dict, wanted: Places) -> dict:
    """The teacher's index of every block, where the preset or the file itself says it."""
    count = count_blocks(host, wanted)
    if request.preset == AS_NUMBERED:
        return {"indices": list(range(count))}
    if request.preset == BY_INTERVALS:
        return {"indices": teacher_indices(count, parse_intervals(request.intervals))}
    if request.preset in RELEASES:
        blocks, kept, intervals = RELEASES[request.preset]
        if count != kept:
            raise ValueError(f"the file has {count} blocks, the preset names {kept}; choose the one of this model")
        return {"indices": teacher_indices(count, parse_intervals(intervals)), "blocks": blocks}
    if request.preset != AUTO:
        raise ValueError(f"preset {request.preset!r} is unknown; known: {', '.join(PRESETS)}")
    hints = hints_in(stored)
    if "indices" in hints:
        return {name: hints[name] for name in ("indices", "blocks") if name in hints}
    own_map = metadata_in(stored).get(MAP_KEY)
    return {"indices": blocks_in_text(own_map)} if own_map else {}
