"""The names, shapes and dtypes of a bundle's tensors, checked against its plan."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from ..architectures import Architecture, architecture_named
from ..plan import SITE_KINDS, Interval, PruningPlan
from ..system.json_text import shown
from ..system.tensor_files import TensorFile
from .filling import check_shape
from .layout import layout_of
from .surgery import build_student, pruned_blocks

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


def check_bundle(file: TensorFile, plan: PruningPlan, whole: bool = False) -> None:
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
    architecture: Architecture, plan: PruningPlan, file: TensorFile
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
                blocks = pruned_blocks(
                    architecture,
                    layout_of(plan, variant),
                    lambda index, edit: edit(architecture.build_block(plan.config, index)),
                    lambda interval: build_student(architecture, plan.config, interval),
                )
                model = architecture.assemble(
                    architecture.build_outer(plan.config), plan.config, blocks
                )
                yield from (
                    (tuned_prefix(variant.name) + n, tuple(t.shape))
                    for n, t in model.state_dict().items()
                )


def _check_projection(file: TensorFile, name: str, width: int) -> None:
    match = PROJECTION.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{file.path}: {shown(name)} is not the name of a projection; the file does not match its plan"
        )
    check_shape(
        name, file.shape(name), (width, width) if match[4] == "weight" else (width,), file.path
    )


def _check_whole(file: TensorFile, plan: PruningPlan, expected: dict[str, tuple[int, ...]]) -> None:
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
