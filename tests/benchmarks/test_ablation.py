"""Every row of the ablation in its quick form."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from benchmarks.ablation import __main__ as ablation
from benchmarks.ablation import rows as recipes
from benchmarks.ablation import tables

from .quick import quick_teacher, run

pytestmark = pytest.mark.filterwarnings("ignore")
LADDER = [
    "cka_sequential",
    "+ linear probes",
    "+ non-sequential",
    "+ text",
    "+ FFN",
    "+ fine-tune",
]
EQUAL = {"ours", "ours, parts only", "ppcl", *tables.OTHERS}
SIZES = {
    "separate large",
    "separate medium",
    "one training large",
    "one training medium",
    "one training small",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def ablate(folder):
    """Runs it, with a few updates a round: a row of this budget is no longer for 20. Its pictures,
    which show nothing, are drawn in a few steps."""
    options = ("--teacher", quick_teacher(folder), "--work", folder / "work", "--budget", 200)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recipes, "UPDATES", 4)
        patched.setattr(ablation, "Judge", partial(ablation.Judge, steps=2))
        yield lambda *more: run(ablation, folder, *options, *more)


@pytest.fixture(scope="module")
def values(ablate) -> dict:
    return ablate()


def test_every_table_has_its_rows(values):
    names = {table: [row["name"] for row in values[table]] for table in tables.TABLES}
    assert names["ladder"] == LADDER
    assert set(names["equal_parameters"]) == EQUAL
    assert set(names["sizes"]) == SIZES


def test_every_row_is_trained_within_its_budget(values):
    rows = [row for table in tables.TABLES for row in values[table]]
    assert all(row["captions"] == 4 for row in rows)
    assert all(row["passes"] in (0, values["budget"]) for row in rows)
    others = [row["parameters"] for row in rows if row["name"] in tables.OTHERS]
    assert all(row["parameters"] <= max(others) for row in values["equal_parameters"])
    switched = next(row for row in values["ladder"] if row["name"] == "+ non-sequential")
    assert switched["mean_of_subsets"] > 0


def test_what_is_trained_is_read(values, ablate, folder):
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (folder / "work").rglob("row.json")}

    before = written()
    assert before
    ablate()
    assert written() == before


def test_one_table_alone(values, ablate):
    alone = ablate("--tables", "equal_parameters")
    assert alone["equal_parameters"] == values["equal_parameters"]
    assert not {"ladder", "sizes"} & set(alone)
