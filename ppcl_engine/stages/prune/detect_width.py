"""Detect width: which FFNs and runs of text streams a projection can replace in the depth-pruned
model.

Every candidate gets its closed form (ridge, over the whole calibration set); its score is the error
that it adds to the final velocity of the model with all intervals on, or, as in the paper, what the
alignment (CKA) of neighbouring layers leaves to one. Candidates are taken at the least score a
saved parameter until the budget is met.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from ...algorithms.detection.alignment import cka, linear_gram
from ...algorithms.detection.damage import Damage
from ...algorithms.detection.width_fits import Fit, fits_of, standing_block
from ...algorithms.detection.width_solutions import (
    Solutions,
    as_state,
    explained,
    print_warnings,
    ridge_solutions,
)
from ...algorithms.resampling import drawn_tokens
from ...architectures import Architecture
from ...models.assembly import Students
from ...models.cost import CostModel
from ...models.layout import Layout, Place, layout_of
from ...models.streaming import StateStore, Teacher, room_for_states, sweep
from ...plan import SITE_KINDS, PruningPlan, TextGroup, WidthSite
from ...run import Run
from ...settings.prune_settings import DetectWidthConfig
from ...system.atomic import write_json, write_text
from ...system.json_text import json_text
from ...system.progress import Progress
from ...system.tensor_files import write_tensors
from ..inputs import open_calibration, open_plan, open_teacher
from ..run_students import RunStudents

FORMS = {"best": ("paper", "gated"), "paper": ("paper",), "gated": ("gated",)}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Sites that are switched together."""

    sites: tuple[WidthSite, ...]
    saving: int
    """parameters"""
    score: float = 0.0
    """damage, or 1 - CKA"""
    explained: tuple[float, ...] = ()
    """of each block: the share of variance that its projection explains"""
    worst: tuple[float, ...] = ()
    """of each block: the share of variance that is left in its worst channel"""

    @property
    def name(self) -> str:
        site = self.sites[0]
        return TextGroup(self.sites).name if site.kind == "text" else site.name


def detect_width(config: DetectWidthConfig) -> Path:
    """Writes the chosen sites into `plan.json`, every candidate into `width.json`, and the
    alignments."""
    run, teacher = Run(config.run), open_teacher(config)
    calibration = open_calibration(config, teacher.weights)
    plan = open_plan(config, teacher.weights).with_parts(sites=(), variants=())
    students = RunStudents(run, teacher.config, teacher.architecture, polished=False)
    inputs = calibration.all_inputs()
    cost = CostModel.at(teacher.architecture, teacher.config, inputs[0])
    kinds, saving = _kinds(config, teacher), _saving(config, plan, cost)
    candidates = [c for c in _candidates(config, plan, kinds, cost) if c.saving > 0]
    store = StateStore(run.states / "width" if config.streamed else None, room=room_for_states())
    with torch.no_grad():
        alignment = _alignment(config, teacher, students, plan, inputs, store)
        if config.method == "damage":
            fits = list(dict.fromkeys(f for c in candidates for f in _fits(plan, c)))
            solutions = ridge_solutions(teacher, students, inputs, fits, store, config.cache_gb)
            print_warnings(solutions)
            batches = max(1, round(config.samples / calibration.samples * len(calibration)))
            candidates = list(
                _measured(config, teacher, students, plan, inputs[-batches:], candidates, solutions)
            )
            solutions.clear()
        else:
            candidates = [replace(c, score=_misaligned(plan, c, alignment)) for c in candidates]
    chosen = choose(candidates, saving, plan)
    sites = tuple(replace(site, score=c.score) for c in chosen for site in c.sites)
    metadata = {"places": json_text([p.name for p in _natural(plan).places])}
    write_tensors(run.alignment, alignment, metadata, gaps=True)
    write_json(run.width, _summary(config, candidates, chosen))
    write_text(run.plan, plan.with_parts(sites=sites).to_json() + "\n")
    return run.plan


def choose(candidates: list[Candidate], saving: float, plan: PruningPlan) -> list[Candidate]:
    """The set that meets the budget at the least sum of scores, of those that start from any one
    text group or none.

    Cheap FFNs of the text would otherwise keep the group out that holds them. Raises ValueError
    when all candidates together save too little.
    """
    groups = [c for c in candidates if c.sites[0].kind == "text"]
    sets = [
        _cheapest(candidates, saving, plan, start) for start in ([], *([group] for group in groups))
    ]
    left = min(saving - sum(c.saving for c in chosen) for chosen in sets)
    if left > 0:
        raise ValueError(
            f"width sites leave the model {left / 1e6:.2f} M parameters above --share; raise it, or detect more "
            "intervals with --remove"
        )
    enough = [chosen for chosen in sets if sum(c.saving for c in chosen) >= saving]
    return min(enough, key=lambda chosen: sum(c.score for c in chosen))


def _cheapest(
    candidates: list[Candidate], saving: float, plan: PruningPlan, start: list[Candidate]
) -> list[Candidate]:
    """Least score a saved parameter first, until the budget is met; what a plan refuses together is
    passed over."""
    chosen = list(start)
    for candidate in sorted(candidates, key=lambda c: (c.score / c.saving, c.name)):
        if sum(c.saving for c in chosen) >= saving:
            break
        if _fit_together(plan, [*chosen, candidate]):
            chosen.append(candidate)
    return chosen


def _fit_together(plan: PruningPlan, candidates: list[Candidate]) -> bool:
    """Every text group keeps a full block of its own before it, and no part of a block is replaced
    twice."""
    sites = [site for c in candidates for site in c.sites]
    if len({(s.block, s.kind) for s in sites}) < len(sites):
        return False
    text = {site.block for site in sites if site.kind == "text"}
    if any(site.kind == "ffn_text" and site.block in text for site in sites):
        return False
    groups = plan.with_parts(sites=tuple(s for s in sites if s.kind == "text")).text_groups
    return {g.name for g in groups} == {c.name for c in candidates if c.sites[0].kind == "text"}


def _saving(config: DetectWidthConfig, plan: PruningPlan, cost: CostModel) -> float:
    """Parameters that the sites have to save. Raises ValueError when the intervals alone meet the
    budget."""
    deep, full = (
        cost.variant(plan, v).parameters for v in (plan.everything(), plan.variant("full"))
    )
    if deep <= config.share * full:
        raise ValueError(
            f"the intervals alone leave {deep / full:.1%} of the parameters, no more than --share {config.share}; lower it"
        )
    return deep - config.share * full


def _kinds(config: DetectWidthConfig, teacher: Teacher) -> tuple[str, ...]:
    """The requested kinds that the model has. Raises ValueError if it has none of them."""
    kinds = tuple(config.kinds.replace(",", " ").split())
    unknown = [kind for kind in kinds if kind not in SITE_KINDS]
    if unknown or not kinds:
        raise ValueError(f"--kinds {config.kinds!r}: choose from {', '.join(SITE_KINDS)}")
    blocks = range(teacher.num_blocks)
    there = {kind for i in blocks for kind in teacher.architecture.site_kinds(teacher.config, i)}
    if not there.intersection(kinds):
        raise ValueError(
            f"--kinds {config.kinds!r}: this model has {', '.join(k for k in SITE_KINDS if k in there)}"
        )
    return tuple(kind for kind in kinds if kind in there)


def _natural(plan: PruningPlan) -> Layout:
    return layout_of(plan, plan.everything())


def _candidates(
    config: DetectWidthConfig, plan: PruningPlan, kinds: tuple[str, ...], cost: CostModel
) -> Iterator[Candidate]:
    """All FFNs in their forms; all text groups up to the longest, none before the first block."""
    for kind in kinds:
        places = [
            p
            for p in _natural(plan).places
            if kind in cost.architecture.site_kinds(plan.config, p.index)
        ]
        if kind != "text":
            for place in places:
                for form in forms_asked(config.form, cost.architecture, kind):
                    yield _candidate(
                        plan, cost, (WidthSite(block=place.index, kind=kind, form=form),)
                    )
            continue
        for start in range(1, len(places)):
            for end in range(start, min(len(places), start + config.longest)):
                blocks = range(places[start].index, places[end].last + 1)
                yield _candidate(plan, cost, tuple(WidthSite(block=b, kind="text") for b in blocks))


def forms_asked(asked: str, architecture: Architecture, kind: str) -> tuple[str, ...]:
    """The forms that a setting asks for, of those that a kind of site has; all of these where it
    has none of them."""
    known = architecture.forms[kind] if kind in architecture.forms else FORMS["best"]
    return tuple(form for form in FORMS[asked] if form in known) or known


def _candidate(plan: PruningPlan, cost: CostModel, sites: tuple[WidthSite, ...]) -> Candidate:
    pruned = plan.with_parts(sites=sites)
    before, after = (cost.variant(p, p.everything()).parameters for p in (plan, pruned))
    return Candidate(sites=sites, saving=before - after)


def _fits(plan: PruningPlan, candidate: Candidate) -> list[Fit]:
    pruned = plan.with_parts(sites=candidate.sites)
    return fits_of(pruned, _natural(pruned))


def _measured(
    config: DetectWidthConfig,
    teacher: Teacher,
    students: Students,
    plan: PruningPlan,
    inputs: list,
    candidates: list[Candidate],
    solutions: Solutions,
) -> Iterator[Candidate]:
    """Each with the error that it adds to the velocity of the depth-pruned model, relative to that
    velocity."""
    layouts = [_natural(plan.with_parts(sites=candidate.sites)) for candidate in candidates]
    fits = [_fits(plan, candidate) for candidate in candidates]
    standing: dict[tuple[Place, str], Fit] = {}
    for layout, some in zip(layouts, fits, strict=True):
        places = {place.index: place for place in layout.places}
        standing |= {(places[fit.place.index], fit.kind): fit for fit in some}

    def projections(place: Place, kind: str) -> dict[str, torch.Tensor]:
        state = as_state(solutions[standing[place, kind]])
        return {name: tensor.to(teacher.device, teacher.dtype) for name, tensor in state.items()}

    everything = plan.everything()
    store = (
        StateStore(Run(config.run).states / "damage", room=room_for_states())
        if config.streamed
        else None
    )
    damage = Damage(
        teacher, students, plan, inputs, everything, projections, config.cache_gb, store
    )
    damage.measure(layouts, "detect-width")
    known = solutions.without_maps()
    for candidate, layout, some in zip(candidates, layouts, fits, strict=True):
        error, power = damage.per_sample(layout)
        yield replace(
            candidate,
            score=float(error.sum() / power.sum()),
            explained=tuple(explained(known[fit]["map"]) for fit in some),
            worst=tuple(known[fit]["map"].report["worst"] for fit in some),
        )


def _alignment(
    config: DetectWidthConfig, teacher: Teacher, students: Students, plan, inputs, store
) -> dict[str, torch.Tensor]:
    """`text` [places, places]: CKA of the modulated text of every two places; of each kind of FFN
    [places]: of the stream before and after it. NaN where a place has no such part."""
    places = _natural(plan).places
    rows: dict[str, dict[int, torch.Tensor]] = {}
    embedded = [teacher.embed(row) for row in inputs]
    at = {place.index: (row, place) for row, place in enumerate(places)}
    blocks = sweep(teacher, embedded, store, teacher.num_blocks - 1)
    for index, walked, batches in Progress(
        blocks, total=teacher.num_blocks, desc="alignment", unit="block"
    ):
        if index in at:
            row, place = at[index]
            block = standing_block(teacher, students, place, walked)
            states = [store.get(index, batch, embedded[batch]) for batch in batches]
            seen = [teacher.architecture.observe(block, state)[1] for state in states]
            for name in seen[0]:
                stream = name.split("_")[0]
                parts = [
                    _some_tokens(s[name], state.real(stream), config)
                    for s, state in zip(seen, states, strict=True)
                ]
                rows.setdefault(name, {})[row] = torch.cat(parts).cpu()
    store.clear()
    text = {row: linear_gram(x) for row, x in rows.get("text_modulated", {}).items()}
    found = {"text": torch.full((len(places), len(places)), torch.nan, dtype=torch.float64)}
    for a, b in product(text, text):
        found["text"][a, b] = cka(text[a], text[b])
    for stream in (
        name.removesuffix("_before_ffn") for name in rows if name.endswith("_before_ffn")
    ):
        found[f"ffn_{stream}"] = torch.full((len(places),), torch.nan)
        for row, before in rows[f"{stream}_before_ffn"].items():
            found[f"ffn_{stream}"][row] = cka(
                linear_gram(before), linear_gram(rows[f"{stream}_after_ffn"][row])
            )
    return found


def _some_tokens(x: torch.Tensor, real: torch.Tensor, config: DetectWidthConfig) -> torch.Tensor:
    """`tokens` of every sample's real tokens, drawn with the seed: [n * tokens, d]."""
    generator = torch.Generator().manual_seed(config.seed)
    chosen = drawn_tokens(real, config.tokens, generator).to(x.device)
    return torch.gather(x, 1, chosen[..., None].expand(-1, -1, x.shape[-1])).flatten(0, 1)


def _misaligned(
    plan: PruningPlan, candidate: Candidate, alignment: dict[str, torch.Tensor]
) -> float:
    """Sum over the places of 1 - CKA: with the group's source (text), across the FFN."""
    order = {place.index: number for number, place in enumerate(_natural(plan).places)}
    kind, rows = (
        candidate.sites[0].kind,
        [order[s.block] for s in candidate.sites if s.block in order],
    )
    if kind != "text":
        return max(0.0, 1 - float(alignment[kind][rows[0]]))
    return sum(max(0.0, 1 - float(alignment["text"][rows[0] - 1, row])) for row in rows)


def _summary(
    config: DetectWidthConfig, candidates: list[Candidate], chosen: list[Candidate]
) -> dict:
    taken = {id(c) for c in chosen}
    rows = [
        {
            "name": c.name,
            "form": c.sites[0].form,
            "score": c.score,
            "saving": c.saving,
            "explained": list(c.explained),
            "worst": list(c.worst),
            "chosen": id(c) in taken,
        }
        for c in candidates
    ]
    return {"method": config.method, "share": config.share, "candidates": rows}
