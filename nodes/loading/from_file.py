"""What a loader reads from a file that holds a whole model: standalone, released or plain."""

from __future__ import annotations

from ...ppcl_engine.architectures.folded import FOLDING, Folding, folding_of
from ...ppcl_engine.models.bundle import MAP_KEY
from ...ppcl_engine.models.layout import layout_of
from ...ppcl_engine.models.released import teacher_indices
from ...ppcl_engine.models.stored_layout import (
    HINTS_TENSOR,
    STRUCTURE_TENSOR,
    as_tensor,
    hints_in,
    open_layout,
)
from ...ppcl_engine.plan import PruningPlan, parse_intervals, plan_from_json
from ..host import host_of
from ..host.base import Host
from ..host.detecting import blocks_in_text
from ..host.formats import refuse_foreign
from ..host.modulations import OFF, MakeFold, Modulations, split
from ..host.structure import checked_plan, count_blocks, is_surrounding, text_of
from .request import (
    AS_NUMBERED,
    AUTO,
    BY_INTERVALS,
    PRESETS,
    RELEASES,
    Content,
    Locations,
    Request,
    check_not_folded,
    with_fold,
)
from .stored import Reader, in_host_names, locations_in, metadata_in


def file_content(
    request: Request, make_fold: MakeFold | None, opened: tuple[dict, dict | None]
) -> Content:
    """The content of our own standalone file, a released file or folder, or a plain model, folded or
    not. opened: as `open_layout` gives it."""
    stored, config = opened[0], opened[1] or hints_in(opened[0]).get("config")
    refuse_foreign(stored, request.path.name)
    host = host_of(stored, request.path.name)
    wanted = locations_in(
        {name: location for name, location in stored.items() if _needed(name)}, request.path.name
    )
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
        hints = {
            "legacy": request.legacy_text,
            "config": config,
            **_indices(host, request, stored, wanted),
        }
        hints |= {FOLDING: fold.folding.to_config()} if fold else {}
        tensors[HINTS_TENSOR] = as_tensor(hints)
    if fold and plan is not None:
        plan = plan.with_parts(config={**plan.config, FOLDING: fold.folding.to_config()})
        tensors[STRUCTURE_TENSOR] = as_tensor(plan.to_json())
    content = with_fold(Content(tensors, metadata_in(stored), reader.bytes_read), fold)
    content.later = content.later or later
    return content


def _later(host: Host, request: Request, folding: Folding | None) -> Modulations | None:
    """For a folded table whose original file is given as base: the modulations there, which give the
    timesteps that the table lacks."""
    if request.base is None:
        return None
    if folding is None or folding.form != "table":
        raise ValueError(
            f"{request.path.name} is not a bundle, so it takes no base model; set base to none"
        )
    stored, _ = open_layout(request.base)
    locations = locations_in(
        {name: location for name, location in stored.items() if not is_surrounding(name)},
        request.base.name,
    )
    _, modulations = split(host.engine, locations)
    if modulations.mark != folding.mark:
        raise ValueError(
            f"{request.path.name} was not folded from {request.base.name}; choose the file it was folded from, or none"
        )
    return modulations


def _of_file(host: Host, stored: Locations, plan: PruningPlan | None) -> Locations:
    """Locations by the host's names. A file without a plan has whole blocks only, or is one that the
    authors released."""
    if plan is None:
        return in_host_names(host, {blocks.depth: 0 for blocks in host.lists}, stored)
    return in_host_names(host, plan.config, stored, layout_of(plan, plan.everything()).places)


def _needed(name: str) -> bool:
    return not is_surrounding(name) or name == STRUCTURE_TENSOR


def _indices(host: Host, request: Request, stored: dict, wanted: Locations) -> dict:
    """Hints with the teacher's index of every block, if the preset or the file itself gives them."""
    count = count_blocks(host, wanted)
    if request.preset == AS_NUMBERED:
        return {"indices": list(range(count))}
    if request.preset == BY_INTERVALS:
        return {"indices": teacher_indices(count, parse_intervals(request.intervals))}
    if request.preset in RELEASES:
        blocks, kept, intervals = RELEASES[request.preset]
        if count != kept:
            raise ValueError(
                f"the file has {count} blocks, the preset names {kept}; choose this model's preset"
            )
        return {"indices": teacher_indices(count, parse_intervals(intervals)), "blocks": blocks}
    if request.preset != AUTO:
        raise ValueError(f"preset {request.preset!r} is unknown; known: {', '.join(PRESETS)}")
    hints = hints_in(stored)
    if "indices" in hints:
        return {name: hints[name] for name in ("indices", "blocks") if name in hints}
    own_map = metadata_in(stored).get(MAP_KEY)
    return {"indices": blocks_in_text(own_map)} if own_map else {}
