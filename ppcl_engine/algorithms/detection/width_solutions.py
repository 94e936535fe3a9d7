"""Ridge solutions for width fits over a whole calibration set, in few sweeps of the teacher."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ...architectures import BlockState, Inputs
from ...models.assembly import Students
from ...models.layout import Place
from ...models.streaming import StateStore, Teacher, read_bare, sweep, write_bare
from ...system.distributed import processes
from ...system.progress import Progress
from ..grouping import groups_within
from ..least_squares import RIDGE, InputMoments, NormalEquations, Solution
from .width_fits import Fit, counted, own_pair, standing_block


def ridge_solutions(
    teacher: Teacher,
    students: Students,
    inputs: Sequence[Inputs],
    fits: Sequence[Fit],
    store: StateStore,
    memory_gb: float,
) -> Solutions:
    """The solutions of all fits over all inputs, in as few sweeps of the teacher as `memory_gb` of
    normal equations allow.

    Solutions are float32 in the host's memory; where states are on disk, so are they.
    """
    solutions = Solutions.beside(store)
    for chunk in _chunks(fits, teacher.architecture.width(teacher.config), memory_gb * 1e9):
        accumulated = _Accumulation(teacher, students, chunk, store)
        accumulated.sweep(inputs)
        accumulated.solve_into(solutions)
    return solutions


def _chunks(fits: Sequence[Fit], width: int, limit: float) -> Iterator[list[Fit]]:
    """Consecutive fits whose normal equations fit into `limit` bytes, at least one. Fits with the
    same source share X^T X."""
    matrix = 8 * (width + 1) ** 2

    def size(some: Sequence[Fit]) -> int:
        """X^T Y of every part; X^T X of every part, or of every source, whose factor is kept
        too."""
        own = sum(len(fit.parts) for fit in some if not fit.source)
        shared = len({(fit.source, part) for fit in some if fit.source for part in fit.parts})
        return matrix * (sum(len(fit.parts) for fit in some) + own + 2 * shared)

    return groups_within(limit, fits, size)


class Solutions(Mapping[Fit, dict[str, Solution]]):
    """The solution of every fit, by part; with a folder the maps are on disk and are read when
    asked for."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._kept: dict[Fit, dict[str, Solution]] = {}
        self._paths: dict[Fit, Path] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def beside(cls, store: StateStore) -> Solutions:
        return cls(store.folder and store.folder.with_name(f"{store.folder.name}_solutions"))

    def add(self, fit: Fit, parts: dict[str, Solution]) -> None:
        kept = {part: _on_host(solution) for part, solution in parts.items()}
        if self.folder is not None:
            self._paths[fit] = self.folder / f"fit_{len(self._paths)}"
            write_bare(
                self._paths[fit], [tensor for s in kept.values() for tensor in (s.weight, s.bias)]
            )
            kept = {
                part: replace(s, weight=s.weight.to("meta"), bias=s.bias.to("meta"))
                for part, s in kept.items()
            }
        self._kept[fit] = kept

    def __getitem__(self, fit: Fit) -> dict[str, Solution]:
        kept = self._kept[fit]
        if self.folder is None:
            return kept
        known = [(t.dtype, t.shape) for s in kept.values() for t in (s.weight, s.bias)]
        tensors = read_bare(self._paths[fit], known)
        return {
            part: replace(s, weight=next(tensors), bias=next(tensors)) for part, s in kept.items()
        }

    def __iter__(self) -> Iterator[Fit]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self._kept.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def without_maps(self) -> dict[Fit, dict[str, Solution]]:
        """Only how well they fit; maps that are on disk are not read."""
        return self._kept


def _on_host(solution: Solution) -> Solution:
    maps = {name: getattr(solution, name).float().cpu() for name in ("weight", "bias", "channels")}
    return replace(solution, **maps)


class _Accumulation:
    """Normal equations of many fits, filled in one sweep of the teacher."""

    def __init__(
        self, teacher: Teacher, students: Students, fits: Sequence[Fit], store: StateStore
    ):
        self.teacher, self.students, self.store = teacher, students, store
        self.architecture = teacher.architecture
        width, device = self.architecture.width(teacher.config), teacher.device
        sources = dict.fromkeys((f.source, part) for f in fits if f.source for part in f.parts)
        self.inputs = {key: InputMoments(width, device) for key in sources}
        self.sums = {
            f: {
                part: NormalEquations(width, width, device, self._inputs_of(f, part))
                for part in f.parts
            }
            for f in fits
        }
        self.read_last = {
            f.source: max(g.place.last for g in fits if g.source == f.source)
            for f in fits
            if f.source
        }
        """source -> the last block at which anything reads what it left"""
        self.source_seen: dict[tuple[Place, int], dict[str, torch.Tensor]] = {}

    def _inputs_of(self, fit: Fit, part: str) -> InputMoments | None:
        return self.inputs[fit.source, part] if fit.source else None

    def sweep(self, inputs: Sequence[Inputs]) -> None:
        embedded = [self.teacher.embed(row) for row in inputs]
        last = max(fit.place.last for fit in self.sums)
        blocks = sweep(self.teacher, embedded, self.store, last)
        for index, walked, batches in Progress(
            blocks, total=last + 1, desc="projections", unit="block"
        ):
            for place in self._places_at(index):
                block = standing_block(self.teacher, self.students, place, walked)
                for batch in batches:
                    self._observe(
                        place, block, self.store.get(index, batch, embedded[batch]), batch
                    )
            for batch in batches:
                self._step(index, self.store.get(index + 1, batch, embedded[batch]), batch)
            for place in [place for place, read in self.read_last.items() if read == index]:
                for batch in batches:
                    self.source_seen.pop((place, batch), None)
        self.store.clear()

    def solve_into(self, solutions: Solutions) -> None:
        """Frees each fit's sums once it is solved."""
        for moments in self.inputs.values():
            moments.xx = processes().sum(moments.xx)
        for fit in list(self.sums):
            parts = self.sums.pop(fit)
            solved = {
                part: sums.shared(processes().sum).solve(RIDGE, rank=True)
                for part, sums in parts.items()
            }
            solutions.add(fit, solved)

    def _places_at(self, index: int) -> list[Place]:
        places = [fit.place for fit in self.sums] + list(self.read_last)
        return list(dict.fromkeys(p for p in places if p.index == index))

    def _observe(self, place: Place, block: nn.Module, state: BlockState, batch: int) -> None:
        after, seen = self.architecture.observe(block, state)
        if place in self.read_last:
            self._keep_source(
                place, {"text_modulated": seen["text_modulated"], "text": after.text}, state, batch
            )
        for fit, parts in self.sums.items():
            if fit.place == place:
                source = self._source(fit.source, batch) if fit.source else None
                x, y = own_pair(fit, seen, source)
                rows = counted(fit, state, self.teacher.used_streams(place.last))
                parts["map"].add(x[rows], y[rows])

    def _keep_source(
        self, place: Place, seen: dict[str, torch.Tensor], state: BlockState, batch: int
    ) -> None:
        """Keeps what later fits read from this place, and adds it to the sums, which are the same
        for all of them."""
        real = state.real("text")
        for part, name in (("map", "text_modulated"), ("step", "text")):
            if (place, part) in self.inputs:
                self.inputs[place, part].add(seen[name][real])
        rest = "cpu" if self.teacher.streamed else self.teacher.device
        self.source_seen[place, batch] = {name: tensor.to(rest) for name, tensor in seen.items()}

    def _source(self, source: Place, batch: int) -> dict[str, torch.Tensor]:
        seen = self.source_seen[source, batch]
        return {name: tensor.to(self.teacher.device) for name, tensor in seen.items()}

    def _step(self, index: int, after: BlockState, batch: int) -> None:
        """Compares the teacher's text behind a group's last block with the text that the group's
        source left."""
        for fit, parts in self.sums.items():
            if fit.source and "step" in parts and fit.place.last == index:
                real, before = after.real("text"), self._source(fit.source, batch)["text"]
                parts["step"].add(before[real], after.text[real].float() - before[real].float())


def warnings_of(solutions: Mapping[Fit, dict[str, Solution]]) -> Iterator[str]:
    """One line for every fit with fewer independent directions than unknowns."""
    for fit, parts in solutions.items():
        for part, solution in parts.items():
            width = solution.weight.shape[1]
            if solution.rank is not None and solution.rank < width:
                yield (
                    f"warning: {fit.name} ({part}) is rank-deficient: rank {solution.rank} of {width} from "
                    f"{solution.rows} tokens; the ridge decides the rest, calibrate with more samples"
                )


def print_warnings(solutions: Solutions) -> None:
    for line in warnings_of(solutions.without_maps()) if processes().writes else ():
        tqdm.write(line, file=sys.stderr)


def as_state(parts: dict[str, Solution]) -> dict[str, torch.Tensor]:
    """The tensors, float32, named as in `surgery.projection_state`."""
    state = {f"{part}.weight": solution.weight for part, solution in parts.items()}
    return state | {f"{part}.bias": solution.bias for part, solution in parts.items()}


def explained(solution: Solution) -> float:
    """The share of the target's variance that the projection explains."""
    return 1 - solution.residual if math.isfinite(solution.residual) else 0.0
