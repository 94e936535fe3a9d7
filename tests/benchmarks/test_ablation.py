"""Every row of the ablation in its quick form."""

import pytest

from benchmarks.ablation import __main__ as ablation

from .quick import quick_teacher, run


@pytest.mark.filterwarnings("ignore")
def test_ablation_trains_every_row_within_its_budget_and_goes_on(tmp_path):
    options = ("--teacher", quick_teacher(tmp_path), "--work", tmp_path / "work", "--budget", 200)
    values = run(ablation, tmp_path, *options)
    rows = {
        (row["table"], row["name"]): row
        for table in ("ladder", "equal_parameters", "sizes")
        for row in values[table]
    }
    assert {name for table, name in rows if table == "equal_parameters"} == {
        "ours",
        "ours, parts only",
        "ppcl",
        *ablation.OTHERS,
    }
    assert {name for table, name in rows if table == "sizes"} == {
        "separate large",
        "separate medium",
        "one training large",
        "one training medium",
        "one training small",
    }
    assert [name for table, name in rows if table == "ladder"] == [
        "cka_sequential",
        "+ linear probes",
        "+ non-sequential",
        "+ text",
        "+ FFN",
        "+ fine-tune",
    ]
    most = max(row["parameters"] for (table, name), row in rows.items() if name in ablation.OTHERS)
    assert all(
        row["parameters"] <= most for (table, _), row in rows.items() if table == "equal_parameters"
    )
    assert all(
        row["captions"] == 4 and row["passes"] in (0, values["budget"]) for row in rows.values()
    )
    assert rows["ladder", "+ non-sequential"]["mean_of_subsets"] > 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("row.json")}
    run(ablation, tmp_path, *options)
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("row.json")
    } == before
    one = run(ablation, tmp_path, *options, "--tables", "equal_parameters")
    assert one["equal_parameters"] == values["equal_parameters"] and not {"ladder", "sizes"} & set(
        one
    )
