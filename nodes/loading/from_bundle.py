"""What a loader reads of a bundle and its base model."""

from __future__ import annotations

from pathlib import Path

import torch

from ...ppcl_engine.architectures.base import modulation_names
from ...ppcl_engine.architectures.folded import FOLDING, folding_of
from ...ppcl_engine.models.bundle import Bundle
from ...ppcl_engine.models.bundle_contents import projection_prefix, student_prefix, tuned_prefix
from ...ppcl_engine.models.layout import Layout, Place, layout_of
from ...ppcl_engine.models.standalone import structure_of
from ...ppcl_engine.models.stored_layout import HINTS_TENSOR, STRUCTURE_TENSOR, as_tensor
from ...ppcl_engine.models.weights import fingerprint_of, parts_in
from ...ppcl_engine.plan import Interval, PruningPlan, Variant
from ...ppcl_engine.system.float8 import FP8_MARK, FP8_SCALE
from ...ppcl_engine.system.tensor_files import TensorFile
from ..host import host_named
from ..host.base import Cut, Host
from ..host.formats import float8_of, refuse_foreign
from ..host.modulations import OFF, MakeFold, split
from ..host.quantised import FLOAT8, SCALE, in_fp8
from ..host.structure import checked_plan, count_blocks, is_surrounding
from ..paths import GGUF
from .request import (
    Content,
    Locations,
    OpenBase,
    Request,
    check_not_folded,
    variant_in,
    with_fold,
)
from .stored import Reader, in_host_names, locations_in, metadata_in


def bundle_content(request: Request, open_base: OpenBase, make_fold: MakeFold | None) -> Content:
    bundle, reader = Bundle(request.path), Reader()
    host = host_named(bundle.plan.architecture)
    plan = checked_plan(host, bundle.plan)
    variant = variant_in(plan, request.variant)
    if variant.tuned and not request.switchable:
        locations = _under(bundle.file, tuned_prefix(variant.name))
        wanted = in_host_names(host, plan.config, locations, layout_of(plan, variant).places)
        return _content(
            host, reader, wanted, structure_of(plan, variant), {}, variant, (), request, make_fold
        )
    if variant.tuned:
        raise ValueError(
            f"variant {variant.name!r} is fine-tuned, with weights of its own; set switchable to off"
        )
    if request.base is None:
        raise ValueError(
            f"{request.path.name} is a bundle: students only; choose as base the model it was made from"
        )
    opened = open_base(request.base)
    stored = base_tensors(host, request.base, opened)
    check_folded_alike(host, plan, stored, request)
    base = in_host_names(host, plan.config, stored)
    if (count := count_blocks(host, base)) != plan.num_blocks:
        raise ValueError(
            f"{request.base.name} has {count} blocks, the bundle's teacher has {plan.num_blocks}; choose the base it was made from"
        )
    notes, hints, structure = (
        check_base(host, reader, stored, plan, request.base),
        {"switchable": True},
        plan,
    )
    if request.switchable:
        wanted = {**base, **_all_parts(host, bundle)}
    else:
        layout, hints, structure = layout_of(plan, variant), {}, structure_of(plan, variant)
        wanted, notes = _variant_parts(host, base, bundle, layout), (*notes, *layout.notes)
    content = _content(host, reader, wanted, structure, hints, variant, notes, request, make_fold)
    content.metadata = metadata_in(opened)
    return content


def _content(
    host: Host,
    reader: Reader,
    wanted: Locations,
    plan,
    hints: dict,
    variant: Variant,
    notes,
    request,
    make_fold,
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
    content = Content(
        tensors, bytes_read=reader.bytes_read, plan=plan, variant=variant, notes=tuple(notes)
    )
    return with_fold(content, fold)


def check_folded_alike(host: Host, plan: PruningPlan, base: Locations, request: Request) -> None:
    """Raises ValueError unless bundle and base are both folded or both not: students of a folded
    bundle only fit its own folded base."""
    folded_base = any(name.startswith(f"{host.engine.time_embedder}.{FOLDING}.") for name in base)
    if (FOLDING in plan.config) != folded_base:
        which = (
            (request.path.name, request.base.name)
            if folded_base
            else (request.base.name, request.path.name)
        )
        raise ValueError(
            f"{which[0]} is not folded, but {which[1]} is; choose a bundle and a base that were folded together, or both "
            "not folded"
        )


def _with_scales(
    host: Host, tensors: dict[str, torch.Tensor], dtype: torch.dtype, exact: set[str]
) -> dict[str, torch.Tensor]:
    """Matrices of blocks that have no scale (of students and projections) in scaled fp8, like those
    of the base. exact: folded maps, which stay as they are."""
    scaled = {}
    for name, tensor in tensors.items():
        plain = (
            host.block_name.match(name)
            and name.endswith(".weight")
            and tensor.ndim == 2
            and name not in exact
        )
        module = name.removesuffix("weight")
        if plain and not tensors.keys() & {module + SCALE, module + FP8_SCALE.removeprefix(".")}:
            scaled |= {module + leaf: part for leaf, part in in_fp8(tensor, dtype).items()}
    return scaled


def base_tensors(host: Host, path: Path, stored: dict[str, tuple[object, str]]) -> Locations:
    """Where the tensors of a full model are, by the file's names, without a text encoder or VAE."""
    refuse_foreign(stored, path.name)
    if not host.engine.detect(stored):
        raise ValueError(
            f"{path.name} is not a {host.engine.name} model; choose the model that the bundle was made from"
        )
    return locations_in(
        {name: location for name, location in stored.items() if not is_surrounding(name)}, path.name
    )


def check_base(
    host: Host, reader: Reader, base: Locations, plan: PruningPlan, path: Path
) -> tuple[str, ...]:
    """Raises ValueError unless this base is the plan's teacher. The values of a quantised base
    differ, so it can only be compared by names and shapes, which the host does when it loads them;
    the returned note says so."""
    marks = (FP8_MARK, *host.engine.marks)
    parts = parts_in(host.engine, (n for n in base if n not in marks))
    shapes = {key: part.shape(base[part.name].shape) for key, part in parts.items()}
    vectors = {base[part.name] for key, part in parts.items() if len(shapes[key]) == 1}
    if path.suffix == GGUF or any(stored.dtype in FLOAT8 for stored in vectors):
        return (
            f"{path.name} is quantised: whether it is the teacher of this bundle cannot be checked",
        )

    def read(key: str) -> torch.Tensor:
        part = parts[key]
        return Cut(rows=(part.pieces, part.of)).of(reader.read(base[part.name]))

    plan.check_teacher(host.engine.name, fingerprint_of(host.engine, shapes, read), path.name)
    return ()


def _under(file: TensorFile, prefix: str, name: str = "") -> Locations:
    """Where the file's tensors under a prefix are, by names with `name` in place of the prefix."""
    stored = locations_in(
        {key: (file, key) for key in file.keys() if key.startswith(prefix)}, file.path.name
    )
    return {name + key.removeprefix(prefix): location for key, location in stored.items()}


def _student(host: Host, bundle: Bundle, interval: Interval) -> Locations:
    """Where a student's tensors are, by the host's names for the block at the interval's start."""
    config = bundle.plan.config
    prefix = host.engine.block_prefix(config, interval.first)
    return in_host_names(host, config, _under(bundle.file, student_prefix(interval), prefix))


def _all_parts(host: Host, bundle: Bundle) -> Locations:
    """Where all students and projections are, by their names in a switchable model."""
    wanted, config = {}, bundle.plan.config
    for interval in bundle.plan.intervals:
        prefix = host.prefix(config, interval.first)
        parts = _student(host, bundle, interval)
        wanted |= {
            f"{prefix}student.{name.removeprefix(prefix)}": location
            for name, location in parts.items()
        }
    for name, stored in _under(bundle.file, "projections.").items():
        index = name.split(".")[0].split("-")[0]
        wanted[f"{host.prefix(config, int(index))}projections.{name}"] = stored
    return wanted


def _variant_parts(host: Host, base: Locations, bundle: Bundle, layout: Layout) -> Locations:
    """Where the tensors are that one variant runs, by the host's names."""
    config, places = bundle.plan.config, {place.index: place for place in layout.places}
    wanted = {name: stored for name, stored in base.items() if not host.block_name.match(name)}
    blocks = {name: where for name in base if (where := host.block_of(config, name))}
    for name, (index, part) in blocks.items():
        if index in places and not places[index].interval:
            wanted |= _kept(host, config, places[index], name, part, base[name])
    for place in layout.places:
        prefix = host.prefix(config, place.index)
        if place.interval:
            for name, stored in _student(host, bundle, place.interval).items():
                wanted |= _kept(host, config, place, name, name.removeprefix(prefix), stored)
        for kind in place.projections:
            for part, stored in _under(bundle.file, projection_prefix(place.name, kind)).items():
                name, leaf = part.split(".")
                if name != "step" or place.steps_text:
                    wanted[f"{prefix}{host.engine.comfyui_projections[kind][name]}.{leaf}"] = stored
    return wanted


def _kept(host: Host, config: dict, place: Place, name: str, part: str, stored) -> Locations:
    """A block's tensor, or the part of it that the place's projections leave; nothing where they
    leave nothing."""
    if part.startswith(host.vacated(place)):
        return {}
    module, _, leaf = part.rpartition(".")
    for site in place.ffn:
        cut = host.cuts_at(config, site).get(module)
        if cut and leaf in ("weight", "bias"):
            stored = stored.with_cut(cut)
    return {name: stored}
