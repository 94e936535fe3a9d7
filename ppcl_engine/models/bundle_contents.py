"""What is written into a bundle beside its plan; and its tensors' names, shapes and dtypes, checked
against the plan."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ..architectures import Architecture, architecture_named
from ..plan import SITE_KINDS, Interval, PruningPlan
from ..run import Run
from ..system.json_text import shown
from ..system.tensor_files import TensorEntry, TensorFile
from .assembly import empty_model
from .filling import check_shape
from .layout import layout_of, projections_of
from .real_values import RealValues
from .storing import stored_entries
from .surgery import build_student

STUDENTS, PROJECTIONS, TUNED = "students.", "projections.", "tuned."
PROJECTION = re.compile(
    rf"projections\.([0-9]{{1,4}}(?:-[0-9]{{1,4}})?)\.({'|'.join(SITE_KINDS)})\.(map|step)\.(weight|bias)"
)


def student_prefix(interval: Interval) -> str:
    return f"{STUDENTS}{interval.name}."


def projection_prefix(place: str, kind: str) -> str:
    return f"{PROJECTIONS}{place}.{kind}."


def tuned_prefix(variant: str) -> str:
    return f"{TUNED}{variant}."


def bundle_entries(run: Run, plan: PruningPlan, store: str) -> Iterator[TensorEntry]:
    """What a bundle holds, read when it is written: every student, every projection (also those of
    the blocks that can stand at its place) and every tuned variant. Raises ValueError naming the
    stage to run first."""
    for interval in plan.intervals:
        yield from _saved(
            run.best(run.student(interval.name)), student_prefix(interval), store, "distill-depth"
        )
    for name, kind in projections_of(plan, plan.everything()):
        path = run.best(run.projection(name, kind))
        yield from _saved(path, projection_prefix(name, kind), store, "distill-width")
    for variant in plan.variants:
        if variant.tuned:
            yield from _saved(
                run.tuned_variant(variant.name), tuned_prefix(variant.name), store, "finetune"
            )


def _saved(path: Path, prefix: str, store: str, stage: str) -> Iterator[TensorEntry]:
    """The weights of a saved training, read when they are written."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; run {stage} first")
    file = TensorFile(path)
    for key in file.keys():
        if key.startswith("weight."):
            name = prefix + key.removeprefix("weight.")
            yield from stored_entries(name, file.shape(key), lambda key=key: file.read(key), store)


def check_bundle(file: RealValues, plan: PruningPlan, whole: bool = False) -> None:
    """Raises ValueError, naming file and tensor, for a tensor that the plan has no place for, of
    the wrong shape, or not of numbers; with `whole` also for a missing one."""
    architecture = architecture_named(plan.architecture)
    expected = dict(_expected(architecture, plan, file))
    for name in file.keys():
        if name.startswith(PROJECTIONS):
            _check_projection(file, name, architecture.width(plan.config))
        elif name not in expected:
            raise ValueError(
                f"{file.path}: the plan has no place for {shown(name)}; the file does not match its plan"
            )
        else:
            check_shape(name, file.shape(name), expected[name], file.path)
        if not file.dtype(name).is_floating_point:
            raise ValueError(
                f"{file.path}: {shown(name)} is {file.dtype(name)}, not numbers of a model; restore it"
            )
    if whole:
        _check_whole(file, plan, expected)


def _expected(
    architecture: Architecture, plan: PruningPlan, file: RealValues
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of the tensors of those students and tuned variants that the file has tensors
    of."""
    with torch.device("meta"):
        for interval in plan.intervals:
            student = build_student(architecture, plan.config, interval)
            yield from (
                (student_prefix(interval) + n, tuple(t.shape))
                for n, t in student.state_dict().items()
            )
        for variant in plan.variants:
            if variant.tuned and any(
                name.startswith(tuned_prefix(variant.name)) for name in file.keys()
            ):
                model = empty_model(architecture, plan.config, layout_of(plan, variant))
                yield from (
                    (tuned_prefix(variant.name) + n, tuple(t.shape))
                    for n, t in model.state_dict().items()
                )


def _check_projection(file: RealValues, name: str, width: int) -> None:
    match = PROJECTION.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{file.path}: {shown(name)} is not the name of a projection; the file does not match its plan"
        )
    check_shape(
        name, file.shape(name), (width, width) if match[4] == "weight" else (width,), file.path
    )


def _check_whole(file: RealValues, plan: PruningPlan, expected: dict[str, tuple[int, ...]]) -> None:
    """A bundle that holds only tuned variants needs neither students nor projections."""
    there = set(file.keys())
    if any(name.startswith(STUDENTS) for name in there) or not any(
        variant.tuned for variant in plan.variants
    ):
        for place in layout_of(plan, plan.everything()).places:
            for kind in place.projections:
                leaves = ("map.weight", "map.bias")
                expected = expected | {
                    projection_prefix(place.name, kind) + leaf: () for leaf in leaves
                }
    else:
        expected = {
            name: shape for name, shape in expected.items() if not name.startswith(STUDENTS)
        }
    for variant in plan.variants:
        if variant.tuned and not any(name.startswith(tuned_prefix(variant.name)) for name in there):
            raise ValueError(
                f"{file.path} lacks the tuned variant {variant.name!r}; export it again"
            )
    if missing := sorted(set(expected) - there):
        raise ValueError(
            f"{file.path} lacks {len(missing)} tensors, first {missing[0]}; export it again"
        )
