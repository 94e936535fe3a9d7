"""Width fits: what each projection reads and has to give, and its ridge solution over a whole
calibration set.

All on the teacher's own states (paper, section 3.4): an FFN's projection from what its block or
student sees there, a text group's from the modulated text of the last full block before it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm

from ...architectures import BlockState, Inputs
from ...models.assembly import Students, placed_block
from ...models.layout import Layout, Place, group_places, layout_of
from ...models.streaming import StateStore, Teacher, sweep
from ...plan import PruningPlan
from ...system.distributed import processes
from ...system.progress import Progress
from ..least_squares import NormalEquations, Solution

RIDGE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One projection: at `place` (a student or a teacher's block, nothing projected in it). Text
    reads from `source`; `steps`: it also moves the text on."""

    place: Place
    kind: str
    form: str = "paper"
    source: Place | None = None
    steps: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind} of block {self.place.name}"

    @property
    def stream(self) -> str:
        """What the projection is of: "image", "text", or "joint", both as one sequence."""
        return self.kind.removeprefix("ffn_")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("map", "step") if self.steps else ("map",)


Solutions = dict[Fit, dict[str, Solution]]
Pair = tuple[torch.Tensor, torch.Tensor]


def fits_of(plan: PruningPlan, layout: Layout) -> list[Fit]:
    """The projections of the sites that are on."""
    fits = []
    for name in layout.sites:
        site = plan.site(name)
        if site.kind == "text":
            source, members = group_places(layout, site)
            fits += [
                Fit(place=_bare(p), kind="text", source=_bare(source), steps=p.steps_text)
                for p in members
            ]
        else:
            place = next(p for p in layout.places if p.index == site.block)
            fits.append(Fit(place=_bare(place), kind=site.kind, form=site.form))
    return fits


def fits_of_blocks_given_back(plan: PruningPlan) -> list[Fit]:
    """Projections for the teacher's own blocks, where an interval that holds sites may be given
    back."""
    everything, fits = plan.everything(), []
    with_sites = [i for i in plan.intervals if any(s.block in i.blocks for s in plan.sites)]
    open_to_all = plan.with_parts(
        sites=tuple(replace(s, fitted=(str(s.block),)) for s in plan.sites)
    )
    for interval in with_sites:
        names = tuple(name for name in everything.intervals if name != interval.name)
        layout = layout_of(open_to_all, replace(everything, intervals=names))
        fits += [f for f in fits_of(open_to_all, layout) if f.place.index in interval.blocks]
    return fits


def _bare(place: Place) -> Place:
    return Place(index=place.index, interval=place.interval)


def own_pair(
    fit: Fit, seen: dict[str, torch.Tensor], source_seen: dict[str, torch.Tensor] | None
) -> Pair:
    """(what the projection reads, what it has to give), [n, tokens, d] each (method: width; paper,
    section 3.4)."""
    if fit.kind == "text":
        source = source_seen["text_modulated"]
        return source, seen["text_modulated"] - source
    stream = fit.stream
    if fit.form == "gated":
        return seen[f"{stream}_ffn_input"], seen[f"{stream}_ffn_output"]
    before = seen[f"{stream}_before_ffn"]
    return before, seen[f"{stream}_after_ffn"] - before


def counted(fit: Fit, state: BlockState, used: tuple[str, ...]) -> torch.Tensor:
    """Mask [n, tokens] of the tokens that count: no padding, and nothing of a text that nothing
    reads any more.

    used: streams that are read behind the fit's place.
    """
    real = state.real(fit.stream)
    if fit.stream != "joint" or "text" in used:
        return real
    text_tokens = state.text.shape[1]
    return torch.cat([torch.zeros_like(real[:, :text_tokens]), real[:, text_tokens:]], dim=1)


def ridge_solutions(
    teacher: Teacher,
    students: Students,
    inputs: Sequence[Inputs],
    fits: Sequence[Fit],
    store: StateStore,
    memory_gb: float,
) -> Solutions:
    """All fits over all inputs, in as few sweeps of the teacher as `memory_gb` of normal equations
    allow."""
    width = teacher.architecture.width(teacher.config)
    per_fit = 2 * 2 * 8 * (width + 1) ** 2
    chunk = max(1, int(memory_gb * 1e9 // per_fit))
    solutions: Solutions = {}
    for start in range(0, len(fits), chunk):
        accumulated = _Accumulation(teacher, students, fits[start : start + chunk], store)
        accumulated.sweep(inputs)
        solutions |= {
            fit: {part: sums.shared(processes().sum).solve(RIDGE) for part, sums in parts.items()}
            for fit, parts in accumulated.sums.items()
        }
    return solutions


class _Accumulation:
    """Normal equations of many fits, filled in one sweep of the teacher."""

    def __init__(
        self, teacher: Teacher, students: Students, fits: Sequence[Fit], store: StateStore
    ):
        self.teacher, self.students, self.store = teacher, students, store
        self.architecture = teacher.architecture
        width = self.architecture.width(teacher.config)
        self.sums = {
            fit: {part: NormalEquations(width, width, teacher.device) for part in fit.parts}
            for fit in fits
        }
        self.sources = {fit.source for fit in fits if fit.source}
        self.source_seen: dict[tuple[Place, int], dict[str, torch.Tensor]] = {}

    def sweep(self, inputs: Sequence[Inputs]) -> None:
        embedded = [self.teacher.embed(row) for row in inputs]
        last = max(fit.place.last for fit in self.sums)
        blocks = sweep(self.teacher, embedded, self.store, last)
        for index, _, batches in Progress(blocks, total=last + 1, desc="projections", unit="block"):
            for place in self._places_at(index):
                block = placed_block(
                    self.teacher.weights,
                    self.students,
                    place,
                    self.teacher.dtype,
                    self.teacher.device,
                    {},
                )
                for batch in batches:
                    self._observe(
                        place, block, self.store.get(index, batch, embedded[batch]), batch
                    )
            for batch in batches:
                self._step(index, self.store.get(index + 1, batch, embedded[batch]), batch)
        self.store.clear()

    def _places_at(self, index: int) -> list[Place]:
        places = [fit.place for fit in self.sums] + list(self.sources)
        return list(dict.fromkeys(p for p in places if p.index == index))

    def _observe(self, place: Place, block: nn.Module, state: BlockState, batch: int) -> None:
        after, seen = self.architecture.observe(block, state)
        if place in self.sources:
            self.source_seen[place, batch] = {
                "text_modulated": seen["text_modulated"],
                "text": after.text,
            }
        for fit, parts in self.sums.items():
            if fit.place == place:
                x, y = own_pair(fit, seen, self.source_seen.get((fit.source, batch)))
                rows = counted(fit, state, self.teacher.used_streams(place.last))
                parts["map"].add(x[rows], y[rows])

    def _step(self, index: int, after: BlockState, batch: int) -> None:
        """The teacher's text behind a group's last block against the text that its source left."""
        for fit, parts in self.sums.items():
            if "step" in parts and fit.place.last == index:
                real, before = after.real("text"), self.source_seen[fit.source, batch]["text"]
                parts["step"].add(before[real], after.text[real] - before[real])


def warnings_of(solutions: Solutions) -> Iterator[str]:
    """One line for every fit with fewer independent directions than unknowns."""
    for fit, parts in solutions.items():
        for part, solution in parts.items():
            width = solution.weight.shape[1]
            if solution.rank < width:
                yield (
                    f"warning: {fit.name} ({part}) is rank-deficient: rank {solution.rank} of {width} from "
                    f"{solution.rows} tokens; the ridge decides the rest, calibrate with more samples"
                )


def print_warnings(solutions: Solutions) -> None:
    for line in warnings_of(solutions) if processes().writes else ():
        tqdm.write(line, file=sys.stderr)


def as_state(parts: dict[str, Solution]) -> dict[str, torch.Tensor]:
    """As `surgery.projection_state` names them, float32."""
    state = {f"{part}.weight": solution.weight.float() for part, solution in parts.items()}
    return state | {f"{part}.bias": solution.bias.float() for part, solution in parts.items()}


def explained(solution: Solution) -> float:
    """Share of the target's variance that the projection explains."""
    return 1 - solution.residual if math.isfinite(solution.residual) else 0.0
