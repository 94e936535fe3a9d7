"""Random damages to every kind of file that the engine reads: the right result, or one line that
names the file."""

from __future__ import annotations

import random

import pytest

from benchmarks.hostile.__main__ import outcome
from benchmarks.hostile.subjects import subjects
from benchmarks.hostile.trainings import SAME, SILENT

EACH = 24
SEED = 20


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return {subject.name: subject for subject in subjects(tmp_path_factory.mktemp("subjects"))}


NAMES = (
    "single file of ours",
    "single file of others",
    "diffusers folder",
    "folder with .bin",
    "bundle",
    "bundle's base",
    "standalone",
    "calibration set",
    "probe",
    "saved training",
    "folding table",
    "plan.json",
    "run.json",
    "state.json",
    "events.jsonl",
    "GGUF",
    "LoRA",
)


def test_every_kind_is_here(everything):
    assert set(everything) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_in_one_line_or_read_right(everything, name):
    subject, found = everything[name], []
    right = None if name in ("GGUF", "LoRA") else subject.read()
    for number in range(EACH):
        result = outcome(subject, right, random.Random(f"{SEED} {name} {number}"))
        assert result.kind in (SAME, "refused", "changed") and result.kind != SILENT, (
            number,
            result,
        )
        found.append(result.kind)
    assert "refused" in found
    assert right is None or subject.read() == right
