"""What a loader reads from which file, by the names of the host's model. Knows files and plans, not the host."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..ppcl_engine.architectures import QwenImage
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
from ..ppcl_engine.checkpoint import IGNORED_SUFFIXES, fingerprint_of, open_layout
from ..ppcl_engine.files import TensorFile
from ..ppcl_engine.folding_files import modulation_names
from ..ppcl_engine.layout import Layout, Place, layout_of
from ..ppcl_engine.plan import PruningPlan, Variant, parse_intervals, plan_from_json
from ..ppcl_engine.released import teacher_indices
from ..ppcl_engine.standalone import structure_of
from .float8 import FLOAT8, SCALE_SUFFIX, SCALED, float8_of, in_float8
from .host.structure import BLOCK, HINTS_TENSOR, QWEN, as_tensor, block_numbers, checked_plan, is_surrounding, text_of
from .modulations import FOLDS, OFF, Fold, MakeFold, Modulations, split

SMALLEST, AUTO, AS_NUMBERED, BY_INTERVALS = "smallest", "auto", "as numbered", "by intervals"
PRESETS = (AUTO, AS_NUMBERED, *QWEN.released.intervals, BY_INTERVALS)

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
    """tensors: for the host's loader, marks included. bytes_read: of tensors. variant, plan: of a bundle. later: what a
    table of modulations is filled from when a schedule is known."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    bytes_read: int = 0
    plan: PruningPlan | None = None
    variant: Variant | None = None
    notes: tuple[str, ...] = ()
    later: Modulations | None = None


@dataclass(frozen=True)
class Stored:
    """Where a tensor is; its first `rows` rows where they are given."""

    file: object
    name: str
    rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        full = self.file.shape(self.name)
        return full if self.rows is None else (self.rows, *full[1:])

    def read(self) -> torch.Tensor:
        if self.rows is None:
            return self.file.read(self.name)
        if isinstance(self.file, TensorFile):
            return self.file.read(self.name, self.rows)
        return self.file.read(self.name)[: self.rows]


class Reader:
    """Reads each tensor once and counts bytes; vectors stay, since a fingerprint needs them before the model does."""

    def __init__(self):
        self.bytes_read, self._vectors = 0, {}

    def read(self, stored: Stored) -> torch.Tensor:
        key = (stored.file, stored.name, stored.rows)
        if key not in self._vectors:
            tensor = stored.read()
            self.bytes_read += tensor.nbytes
            if tensor.ndim != 1:
                return tensor
            self._vectors[key] = tensor
        return self._vectors[key]


def open_file(path: Path) -> dict[str, tuple[object, str]]:
    return open_layout(path)[0]


def content_of(request: Request, open_base: OpenBase = open_file, make_fold: MakeFold | None = None) -> Content:
    """`open_base` opens the base model's file; `make_fold` gives what stands for modulations that are folded away. Raises
    ValueError, in one line, for files that do not belong together or are not what they should be."""
    if request.fold not in FOLDS:
        raise ValueError(f"fold {request.fold!r} is unknown; known: {', '.join(FOLDS)}")
    if is_bundle(request.path):
        return _bundle_content(request, open_base, make_fold)
    return _file_content(request, make_fold)


def _bundle_content(request: Request, open_base: OpenBase, make_fold: MakeFold | None) -> Content:
    bundle, reader = Bundle(request.path), Reader()
    plan = checked_plan(bundle.plan)
    variant = plan.variant(request.variant if request.variant != SMALLEST or _has(plan, SMALLEST) else None)
    if variant.tuned and not request.switchable:
        wanted = _under(bundle.file, tuned_prefix(variant.name))
        return _content(reader, wanted, structure_of(plan, variant), {}, variant, (), request, make_fold)
    if variant.tuned:
        raise ValueError(f"variant {variant.name!r} is fine-tuned, with weights of its own; set switchable to off")
    if request.base is None:
        raise ValueError(f"{request.path.name} is a bundle: students only; choose as base the model it was made from")
    base = base_tensors(request.base, open_base)
    check_folded_alike(plan, base, request)
    notes = check_base(reader, base, plan, request.base)
    if request.switchable:
        wanted = {**base, **_all_parts(bundle)}
        return _content(reader, wanted, plan, {"switchable": True}, variant, notes, request, make_fold)
    layout = layout_of(plan, variant)
    wanted = _variant_parts(base, bundle, layout)
    notes = (*notes, *layout.notes)
    return _content(reader, wanted, structure_of(plan, variant), {}, variant, notes, request, make_fold)


def _has(plan: PruningPlan, name: str) -> bool:
    return any(variant.name == name for variant in plan.variants)


def _content(
    reader: Reader, wanted: dict[str, Stored], plan, hints: dict, variant: Variant, notes, request, make_fold
) -> Content:
    fold = None
    if request.fold != OFF:
        check_not_folded(folding_of(plan.config), request)
        wanted, modulations = split(wanted)
        fold = make_fold(request.fold, modulations)
        plan = plan.with_parts(config={**plan.config, FOLDING: fold.folding.to_config()})
    tensors = {name: reader.read(stored) for name, stored in wanted.items()}
    if SCALED in tensors:
        folded = modulation_names(tensors, QWEN) if FOLDING in plan.config else ()
        tensors |= _with_scales(tensors, {f"{name}.weight" for name in folded})
    marks = {STRUCTURE_TENSOR: as_tensor(plan.to_json()), HINTS_TENSOR: as_tensor(hints)}
    return _with_fold(Content({**tensors, **marks}, reader.bytes_read, plan, variant, tuple(notes)), fold)


def _with_fold(content: Content, fold: Fold | None) -> Content:
    if fold is not None:
        content.tensors |= fold.tensors
        content.bytes_read += fold.bytes_read
        content.notes, content.later = (*content.notes, *fold.notes), fold.later
    return content


def check_not_folded(folding: Folding | None, request: Request) -> None:
    if folding is not None:
        raise ValueError(f"{request.path.name} is folded already ({folding.form}); set fold to off")


def check_folded_alike(plan: PruningPlan, base: dict[str, Stored], request: Request) -> None:
    """A folded bundle has students for its own folded base alone."""
    folded_base = any(name.startswith(f"{QWEN.time_embedder}.{FOLDING}.") for name in base)
    if (FOLDING in plan.config) != folded_base:
        which = (request.path.name, request.base.name) if folded_base else (request.base.name, request.path.name)
        raise ValueError(
            f"{which[0]} is not folded, {which[1]} is: they do not belong together; choose both as they were folded "
            "together, or both as they were before"
        )


def _with_scales(tensors: dict[str, torch.Tensor], exact: set[str]) -> dict[str, torch.Tensor]:
    """Matrices of blocks without a scale (students, projections), as the base keeps its own: fp8 and a scale each.
    `exact`: folded maps, which stay as they are."""
    dtype = float8_of(tensors[SCALED])
    found = {}
    for name, tensor in tensors.items():
        scale_name = name.removesuffix(".weight") + SCALE_SUFFIX
        plain = BLOCK.match(name) and name.endswith(".weight") and tensor.ndim == 2 and name not in exact
        if plain and scale_name not in tensors:
            found[name], found[scale_name] = in_float8(tensor, dtype)
    return found


def base_tensors(path: Path, open_base: OpenBase) -> dict[str, Stored]:
    """Of a full model, by the host's names; tables and encoders beside the transformer are left."""
    stored = open_base(path)
    if not QWEN.detect(stored):
        raise ValueError(f"{path.name} is not a Qwen-Image model; choose the model that the bundle was made from")
    return {name: Stored(file, key) for name, (file, key) in stored.items() if not is_surrounding(name)}


def check_base(reader: Reader, base: dict[str, Stored], plan: PruningPlan, path: Path) -> tuple[str, ...]:
    """Whether this is the plan's teacher. Quantised values differ, so only names and shapes can be compared, by the
    host when it loads them: then a note says so."""
    names = {n: s for n, s in base.items() if not n.endswith(IGNORED_SUFFIXES) and n != SCALED}
    shapes = {name: stored.file.shape(stored.name) for name, stored in names.items()}
    count = len(block_numbers(names))
    if count != plan.num_blocks:
        raise ValueError(f"{path.name} has {count} blocks, the bundle's teacher {plan.num_blocks}; choose its own base")
    vectors = [stored for name, stored in names.items() if len(shapes[name]) == 1]
    if path.suffix == ".gguf" or any(stored.file.dtype(stored.name) in FLOAT8 for stored in vectors):
        return (f"{path.name} is quantised: whether it is the very teacher of this bundle cannot be seen",)
    plan.check_teacher(QWEN.name, fingerprint_of(QWEN, shapes, lambda name: reader.read(names[name])), path.name)
    return ()


def _under(file: TensorFile, prefix: str) -> dict[str, Stored]:
    return {name.removeprefix(prefix): Stored(file, name) for name in file.keys() if name.startswith(prefix)}


def _all_parts(bundle: Bundle) -> dict[str, Stored]:
    """Students and projections by the names that a switchable model gives them."""
    found = {}
    for interval in bundle.plan.intervals:
        prefix = f"{QWEN.block_prefix(bundle.plan.config, interval.first)}student."
        found |= {prefix + name: s for name, s in _under(bundle.file, student_prefix(interval)).items()}
    for name, stored in _under(bundle.file, "projections.").items():
        index = name.split(".")[0].split("-")[0]
        found[f"transformer_blocks.{index}.projections.{name}"] = stored
    return found


def _variant_parts(base: dict[str, Stored], bundle: Bundle, layout: Layout) -> dict[str, Stored]:
    """Just what one variant runs."""
    places = {place.index: place for place in layout.places}
    found = {name: stored for name, stored in base.items() if not BLOCK.match(name)}
    for name, stored in base.items():
        match = BLOCK.match(name)
        if match and (place := places.get(int(match[1]))) and not place.interval:
            found |= _kept(place, name, match[2], stored)
    for place in layout.places:
        prefix = QWEN.block_prefix(bundle.plan.config, place.index)
        if place.interval:
            for part, stored in _under(bundle.file, student_prefix(place.interval)).items():
                found |= _kept(place, prefix + part, part, stored)
        for kind in place.projections:
            for part, stored in _under(bundle.file, projection_prefix(place.name, kind)).items():
                name, leaf = part.split(".")
                if name != "step" or place.steps_text:
                    found[f"{prefix}{QwenImage.projection_names[kind][name]}.{leaf}"] = stored
    return found


def _kept(place: Place, name: str, part: str, stored: Stored) -> dict[str, Stored]:
    """A block's tensor, if the place's projections leave it; half of a modulation where they halve it."""
    shorts = {site: {"ffn_image": "img", "ffn_text": "txt"}[site.kind] for site in place.ffn}
    gone = [f"{short}_mlp." for short in shorts.values()]
    if place.text_source is not None:
        gone += ["txt_mod.", "txt_mlp.", "attn.to_add_out.", "correction.maps.text."]
    if part.startswith(tuple(gone)):
        return {}
    halved = tuple(f"{short}_mod.1." for site, short in shorts.items() if site.form == "paper")
    if part.startswith(halved) and part.endswith((".weight", ".bias")):
        stored = replace(stored, rows=stored.file.shape(stored.name)[0] // 2)
    return {name: stored}


def _file_content(request: Request, make_fold: MakeFold | None) -> Content:
    """A standalone of ours, a released file or folder, or a plain model, folded or not."""
    stored, config = open_layout(request.path)
    if not QWEN.detect(stored):
        raise ValueError(f"{request.path.name} is neither a bundle nor a Qwen-Image model; choose another file")
    wanted = {name: Stored(file, key) for name, (file, key) in stored.items() if _needed(name)}
    plan = (
        plan_from_json(text_of(wanted[STRUCTURE_TENSOR].read()), request.path.name)
        if STRUCTURE_TENSOR in wanted
        else None
    )
    folding, fold = folding_of(plan.config if plan else config or {}), None
    if request.fold != OFF:
        check_not_folded(folding, request)
        wanted, modulations = split(wanted)
        fold = make_fold(request.fold, modulations)
    later = _later(request, folding)
    reader = Reader()
    tensors = {name: reader.read(place) for name, place in wanted.items()}
    if plan is None or not (plan.intervals or plan.sites):
        hints = {"legacy": request.legacy_text, "config": config, **_indices(request, stored)}
        hints |= {FOLDING: fold.folding.to_config()} if fold else {}
        tensors[HINTS_TENSOR] = as_tensor(hints)
    if fold and plan is not None:
        plan = plan.with_parts(config={**plan.config, FOLDING: fold.folding.to_config()})
        tensors[STRUCTURE_TENSOR] = as_tensor(plan.to_json())
    content = _with_fold(Content(tensors, reader.bytes_read), fold)
    content.later = content.later or later
    return content


def _later(request: Request, folding: Folding | None) -> Modulations | None:
    """Of a folded table: the file that it was folded from, where that is given as base, for timesteps that it lacks."""
    if request.base is None:
        return None
    if folding is None or folding.form != "table":
        raise ValueError(f"{request.path.name} is no bundle, so it takes no base model; set base to none")
    stored, _ = open_layout(request.base)
    _, modulations = split({name: Stored(file, key) for name, (file, key) in stored.items()})
    if modulations.mark != folding.mark:
        raise ValueError(
            f"{request.base.name} is another model than {request.path.name} was folded from; choose the very file, or none"
        )
    return modulations


def _needed(name: str) -> bool:
    return not is_surrounding(name) or name == STRUCTURE_TENSOR


def _indices(request: Request, stored: dict) -> dict:
    """The teacher's index of every block, where the preset or the file itself says it."""
    count = len(block_numbers(stored))
    if request.preset == AS_NUMBERED:
        return {"indices": list(range(count))}
    if request.preset == BY_INTERVALS:
        return {"indices": teacher_indices(count, parse_intervals(request.intervals))}
    if request.preset in QWEN.released.intervals:
        blocks, _, intervals = QWEN.released.intervals[request.preset]
        return {"indices": teacher_indices(count, parse_intervals(intervals)), "blocks": blocks}
    if request.preset != AUTO:
        raise ValueError(f"preset {request.preset!r} is unknown; known: {', '.join(PRESETS)}")
    file = next(iter(stored.values()))[0]
    own_map = getattr(file, "metadata", {}).get(MAP_KEY)
    return {"indices": json.loads(own_map)} if own_map else {}
