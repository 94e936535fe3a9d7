"""Import: make a bundle or a standalone from a pruned model that the method's authors released.

Its blocks get the teacher's indices back, from the published intervals or from those that the user
gives. If everything outside of intervals and projections is the base's own, a bundle holds only these;
if the rest was fine-tuned too, it holds the whole model as a tuned variant.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ... import __version__
from ...algorithms.least_squares import RIDGE, NormalEquations
from ...architectures import architecture_named
from ...data.calibration import CalibrationSet, load_calibration
from ...models.assembly import empty_model
from ...models.bundle import BUNDLE_SUFFIX, write_bundle
from ...models.bundle_contents import projection_prefix, student_prefix, tuned_prefix
from ...models.layout import Place, group_places, layout_of
from ...models.released import (
    Released,
    published_intervals,
    repeated_steps_warning,
    teacher_indices,
)
from ...models.standalone import write_standalone
from ...models.streaming import StateStore, Teacher, room_for_states, sweep
from ...models.surgery import build_student, empty_block, projection_state
from ...models.teacher_hashes import teacher_hashes
from ...models.tensor_sources import Source
from ...models.weights import Weights
from ...plan import Interval, PruningPlan, Variant, WidthSite, parse_intervals
from ...run import Run
from ...settings.convert_settings import ImportConfig
from ...system.machine import DTYPES, resolve_device
from ...system.progress import Progress
from ...system.tensor_files import TensorEntry

VARIANT = "released"


def import_released(config: ImportConfig) -> Path:
    """Returns the file. Raises ValueError if folder, intervals and base do not fit together."""
    if config.base is None and (config.refit or config.layout == "bundle"):
        what = "--refit" if config.refit else "--layout bundle"
        raise ValueError(f"{what} needs --base, the teacher that {config.path} was pruned from")
    released = Released(config.path, config.legacy_txt_proj)
    base = Weights(config.base) if config.base else None
    plan = plan_of(released, base, _intervals(config, released, base), DTYPES[config.store])
    if base:
        _check_base(released, base, plan, config)
    imported = Imported(released, plan)
    if config.refit and base:
        plan = imported.refit(config, base)
    elif warning := repeated_steps_warning(
        released, teacher_indices(released.num_blocks, plan.intervals)
    ):
        print(f"import: {warning}", file=sys.stderr)
    folder, dtype = Run(config.run).folder / "exports", DTYPES[config.store]
    if base is None or config.layout == "ppcl":
        sources = {
            name: Source(shape, lambda n=name: imported.read(n))
            for name, shape in imported.shapes.items()
        }
        return write_standalone(
            folder / f"{config.name}.safetensors",
            sources,
            plan,
            plan.variant(VARIANT),
            config.store,
        )
    return _write_bundle(folder / f"{config.name}{BUNDLE_SUFFIX}", imported, base, plan, dtype)


def plan_of(
    released: Released, base: Weights | None, intervals: tuple[Interval, ...], dtype: torch.dtype
) -> PruningPlan:
    """A plan with the teacher's indices, and one variant that has everything on."""
    architecture, places = released.architecture, released.layout.places
    teacher = teacher_indices(released.num_blocks, intervals)
    num_blocks = released.num_blocks + sum(interval.removed for interval in intervals)
    last = {interval.first: interval.last for interval in intervals}
    sites = []
    for place, index in zip(places, teacher, strict=True):
        sites += [replace(site, block=index) for site in place.ffn]
        if place.text_source is not None:
            sites += [
                WidthSite(block=block, kind="text")
                for block in range(index, last.get(index, index) + 1)
            ]
    plan = PruningPlan(
        architecture=architecture.name,
        config=architecture.with_blocks(released.config, range(num_blocks)),
        num_blocks=num_blocks,
        fingerprint=base.fingerprint if base else "",
        intervals=intervals,
        sites=tuple(sites),
        provenance={
            "tool": f"ppcl {__version__}",
            "source_model": base.path.name if base else "",
            "imported_from": released.path.name,
        },
    )
    everything = plan.everything()
    parameters = sum(math.prod(shape) for shape in _shapes(plan, everything).values())
    variant = replace(
        everything, name=VARIANT, parameters=parameters, bytes=parameters * dtype.itemsize
    )
    return plan.with_parts(variants=(variant,))


class Imported:
    """The released tensors under the names that they have with the teacher's indices."""

    def __init__(self, released: Released, plan: PruningPlan):
        self.released, self.plan, self.architecture = released, plan, released.architecture
        self.layout = layout_of(plan, plan.variant(VARIANT))
        self.shapes = _shapes(plan, plan.variant(VARIANT))
        self.places = list(zip(released.layout.places, self.layout.places, strict=True))
        self._prefixes = {self.prefix(new): self.prefix(old) for old, new in self.places}
        self._fitted: dict[str, torch.Tensor] = {}
        for old, new in self.places:
            if old.steps_text and not new.steps_text and new.last < plan.num_blocks - 1:
                raise ValueError(
                    f"{released.path} steps the text inside a text group, at block {new.index}, which a plan cannot "
                    "describe; open_model and inspect read the folder as it is"
                )

    def prefix(self, place: Place) -> str:
        return self.architecture.block_prefix(self.plan.config, place.index)

    def released_name(self, name: str) -> str:
        """The name of a tensor in the released folder."""
        prefix = next((prefix for prefix in self._prefixes if name.startswith(prefix)), None)
        return self._prefixes[prefix] + name.removeprefix(prefix) if prefix else name

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in which a text step that the release leaves out is zero: the text then passes the
        group unchanged."""
        if name in self._fitted:
            return self._fitted[name]
        stored = self.released_name(name)
        return (
            self.released.read(stored)
            if self.released.has(stored)
            else torch.zeros(self.shapes[name])
        )

    def projections(self, place: Place) -> Iterator[tuple[str, str, str]]:
        """(site kind, name as `projection_state` gives it, name in the model)"""
        with torch.device("meta"):
            block = empty_block(self.architecture, self.plan.config, place, {})
        for kind in place.projections:
            for name in projection_state(self.architecture, block, kind):
                part, leaf = name.split(".")
                yield (
                    kind,
                    name,
                    f"{self.prefix(place)}{self.architecture.projection_names[kind][part]}.{leaf}",
                )

    def first_change(self, base: Weights) -> str | None:
        """The first tensor outside of intervals and projections that differs from the base's in the
        coarser of both precisions; None if all are equal."""
        skipped = tuple(self.prefix(place) for place in self.layout.places if place.interval)
        skipped += tuple(
            name for place in self.layout.places for _, _, name in self.projections(place)
        )
        for name in Progress(self.shapes, desc="compare", unit="tensor"):
            if not name.startswith(skipped):
                released = self.read(name)
                full = base.read(name)[: len(released)]  # a cut modulation keeps its first half
                coarser = max(released.dtype, full.dtype, key=lambda dtype: torch.finfo(dtype).eps)
                if not torch.equal(released.to(coarser).float(), full.to(coarser).float()):
                    return name
        return None

    def refit(self, config: ImportConfig, base: Weights) -> PruningPlan:
        """Fits the text steps by ridge regression on the teacher's own states. Returns the plan with a
        note of it."""
        path = config.calibration or Run(config.run).calibration
        calibration = load_calibration(path)
        calibration.check_model(base.architecture.name, base.fingerprint, path)
        groups = [group_places(self.layout, group) for group in self.plan.text_groups]
        groups = [(source, members[-1]) for source, members in groups if members[-1].steps_text]
        if not groups:
            raise ValueError(
                f"{self.released.path} has no text step that a block reads; leave --refit out"
            )
        teacher = Teacher(
            base, DTYPES[config.dtype], resolve_device(config.device), config.streamed
        )
        store = StateStore(
            Run(config.run).states / "import" if config.streamed else None, room=room_for_states()
        )
        spans = {last.last: source.last for source, last in groups}
        solved = fit_steps(teacher, calibration, spans, store)
        part = self.architecture.projection_names["text"]["step"]
        for _, place in groups:
            for leaf, tensor in zip(("weight", "bias"), solved[place.last], strict=True):
                self._fitted[f"{self.prefix(place)}{part}.{leaf}"] = tensor
        return self.plan.with_parts(
            provenance={**self.plan.provenance, "refitted_on": calibration.hash}
        )


@torch.no_grad()
def fit_steps(
    teacher: Teacher, calibration: CalibrationSet, spans: dict[int, int], store: StateStore
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Last block of each group -> weight [d, d] and bias [d] of P in text_b = P(text_a) + text_a (the
    text stream's width pruning), fitted on all real tokens in at most one pass of the teacher.
    spans: last block of each group -> the block before the group."""
    embedded = [teacher.embed(inputs) for inputs in calibration.all_inputs()]
    width, solved = embedded[0].text.shape[-1], {}
    walk = sweep(teacher, embedded, store, max(spans))
    for index, _, batches in Progress(walk, total=max(spans) + 1, desc="refit", unit="block"):
        if index in spans.values():
            for batch in batches:
                store.put(f"after_{index}", batch, store.get(index + 1, batch, embedded[batch]))
        if index in spans:
            equations, key = NormalEquations(width, width, teacher.device), f"after_{spans[index]}"
            for batch in batches:
                before, after = (
                    store.get(k, batch, embedded[batch]).real_tokens("text")
                    for k in (key, index + 1)
                )
                equations.add(before, after.double() - before.double())
                store.drop(key, batch)
            solution = equations.solve(RIDGE)
            solved[index] = solution.weight.float().cpu(), solution.bias.float().cpu()
    store.clear()
    return solved


def _intervals(
    config: ImportConfig, released: Released, base: Weights | None
) -> tuple[Interval, ...]:
    """The replaced intervals. Raises ValueError if they are neither published nor given."""
    blocks = base.num_blocks if base else None
    if config.intervals:
        return parse_intervals(config.intervals)
    if blocks == released.num_blocks:
        return ()
    published = published_intervals(released.architecture, released.config, blocks)
    if published is None:
        raise ValueError(
            f"{config.path} has {released.num_blocks} blocks; which of the teacher's blocks they are was not published: "
            "give the intervals that were replaced as --intervals '3-4 8-10'"
        )
    return published


def _check_base(released: Released, base: Weights, plan: PruningPlan, config: ImportConfig) -> None:
    """Raises ValueError if the released model cannot have been pruned from the base."""
    if base.num_blocks != plan.num_blocks:
        raise ValueError(
            f"{config.path} has {released.num_blocks} blocks, which with these intervals makes a teacher of "
            f"{plan.num_blocks}; {config.base} has {base.num_blocks}: correct --intervals or --base"
        )
    if base.architecture is not released.architecture:
        raise ValueError(
            f"{config.base} is {base.architecture.name}, {config.path} is {released.architecture.name}; "
            "choose the base model that it was pruned from"
        )
    for name in sorted(base.config.keys() & plan.config.keys()):
        if base.config[name] != plan.config[name]:
            raise ValueError(
                f"{config.base} is not the teacher of {config.path}: {name} is {base.config[name]}, "
                f"not {plan.config[name]}; choose the base model that it was pruned from"
            )


def _shapes(plan: PruningPlan, variant: Variant) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = empty_model(
            architecture_named(plan.architecture), plan.config, layout_of(plan, variant)
        )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _write_bundle(
    path: Path, imported: Imported, base: Weights, plan: PruningPlan, dtype: torch.dtype
) -> Path:
    changed = imported.first_change(base)
    if changed:
        print(
            f"import: {changed} differs from the base's, so the whole model was fine-tuned and is kept as variant {VARIANT!r}"
        )
        prefix, variant = tuned_prefix(VARIANT), replace(plan.variant(VARIANT), tuned=True)
        names = imported.shapes.items()
        entries = [
            TensorEntry(prefix + n, dtype, shape, lambda n=n: imported.read(n))
            for n, shape in names
        ]
        write_bundle(path, plan.with_parts(variants=(variant,)), entries, teacher_hashes(base))
        return path
    students = [(old, new, new.interval) for old, new in imported.places if new.interval]
    if cut := [new.name for _, new, _ in students if new.projections]:
        print(
            f"import: the release has cut these students; with width sites off, they run with the base's weights there: {' '.join(cut)}"
        )
    entries = [
        entry
        for old, new, interval in students
        for entry in _student_entries(imported, base, old, new, interval, dtype)
    ]
    for place in imported.layout.places:
        for kind, name, model_name in imported.projections(place):
            shape, read = imported.shapes[model_name], lambda n=model_name: imported.read(n)
            entries.append(
                TensorEntry(projection_prefix(place.name, kind) + name, dtype, shape, read)
            )
    write_bundle(path, plan, entries, teacher_hashes(base))
    return path


def _student_entries(
    imported: Imported, base: Weights, old: Place, new: Place, interval: Interval, dtype
) -> Iterator[TensorEntry]:
    """The student at a place, as a whole block: what the release cut off for a width site is taken from
    the base."""
    with torch.device("meta"):
        student = build_student(imported.architecture, imported.plan.config, interval)

    def read(name: str) -> torch.Tensor:
        base_name, released_name = imported.prefix(new) + name, imported.prefix(old) + name
        if not imported.released.has(released_name):
            return base.read(base_name)
        kept = imported.released.read(released_name)
        if len(kept) == base.shape(base_name)[0]:
            return kept.float()
        cut_off = base.read(base_name)[len(kept) :]
        return torch.cat([kept.float(), cut_off.float()])

    for name, tensor in student.state_dict().items():
        yield TensorEntry(
            student_prefix(interval) + name, dtype, tuple(tensor.shape), lambda n=name: read(n)
        )
