"""The benchmarks' quick forms on a tiny random teacher: they run, and their files hold what other
tools read."""

import pytest

from benchmarks import hashing, memory, removal, solving
from benchmarks.distill_speed import __main__ as distill_speed
from benchmarks.distill_speed.recipes import plain_loss
from benchmarks.folding import __main__ as folding
from benchmarks.full_size import __main__ as full_size
from benchmarks.hostile import __main__ as hostile
from benchmarks.lora_adaptation import __main__ as lora_adaptation
from benchmarks.shared import teachers
from benchmarks.shared.teachers import random_teacher
from ppcl_engine.estimate.needs import needs

from .quick import CONFIG, quick_teacher, run

LARGE_ENOUGH = 4e6  # bytes; headers, plans and reports are not counted


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return quick_teacher(tmp_path_factory.mktemp("teacher"))


def test_memory(tmp_path):
    values = run(memory, tmp_path, "--folder", tmp_path)
    depths = {str(depth) for depth in memory.QUICK.depths}
    for stage in memory.STAGES:
        assert values[stage].keys() == values["resident"][stage].keys() == depths
        assert all(peak > 1e8 for peak in values[stage].values())
    assert values["identical"] is True
    assert values["ratios"]["streamed"].keys() == set(memory.STAGES)
    assert values["imports"] > 1e8


def test_folding(tmp_path):
    values = run(folding, tmp_path, "--folder", tmp_path)
    sizes = [row["off"]["parameters"] / 1e9 for row in values["sizes"].values()]
    assert [round(size, 2) for size in sizes] == [20.43, 11.93, 10.60]
    full, *pruned = values["sizes"].values()
    assert [round(full[f"table_{n}"]["maps"] / 1e6) for n in (8, 50)] == [35, 221]
    for row, billions in zip((full, *pruned), (13.7, 8.0, 7.2), strict=True):
        assert all(
            abs(row[form]["parameters"] / 1e9 - billions) < 0.06
            for form in ("table_20", "basis_32")
        )
    assert values["memory"]["forms"].keys() == {"off", "table", "basis"}
    assert (
        values["distil"]["basis"]["trained_bytes"] < 0.8 * values["distil"]["off"]["trained_bytes"]
    )
    assert all(row["identical"] for row in values["pictures"]["variants"])
    assert (tmp_path / "folding.png").stat().st_size > 10_000


def test_memory_intervals_grow_in_number_with_depth():
    assert [len(teachers.intervals(depth)) for depth in memory.FULL.depths] == [3, 12]


def test_random_teacher_is_the_same_for_the_same_seed(tmp_path):
    for name in ("one", "two"):
        random_teacher(tmp_path / name, CONFIG, seed=3)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_distill_speed(tmp_path, teacher):
    values = run(
        distill_speed, tmp_path, "--teacher", teacher, "--intervals", "1-2 3-4", "--batch", 4
    )
    assert values["plain"] > 0 and values.keys() >= {"ours", "plain_light", "ratio", "ratio_light"}
    steps, seconds, loss = values["curves"]["plain"][0][-1]
    assert (
        steps == 6
        and seconds == pytest.approx(values["plain"])
        and loss == pytest.approx(values["target"][0])
    )
    assert all(curve for curves in values["curves"].values() for curve in curves)


def test_the_chain_of_the_plain_recipe_is_the_teacher_when_students_are(tmp_path, teacher):
    """An interval's student that is the teacher's own block, the others skipped: both passes then
    lose the same."""
    import torch
    from torch import nn

    from benchmarks.shared.teachers import rendered
    from ppcl_engine.models.streaming import Teacher
    from ppcl_engine.models.weights import Weights
    from ppcl_engine.plan import parse_intervals

    weights = Weights(teacher)
    source = Teacher(weights, torch.float32, "cpu", streamed=False)
    inputs = rendered(teacher, weights, 2, 2, seed=0).inputs(0)
    students = nn.ModuleDict({"1-2": source.block(1)})
    first = parse_intervals("1-2")
    light = plain_loss(source, students, first, inputs, authors=False)
    assert float(plain_loss(source, students, first, inputs, authors=True)) == pytest.approx(
        2 * float(light)
    )


def test_parallel(tmp_path, teacher):
    """One process only: test_parallel.py has the launches."""
    from benchmarks import parallel

    values = run(
        parallel,
        tmp_path,
        "--teacher",
        teacher,
        "--intervals",
        "1-2 3-4",
        "--batch",
        4,
        "--processes",
    )
    (row,) = values["rows"]
    assert row["ratio"] == 1 and row["largest_difference"] == 0 and row["start_seconds"] > 0


def test_distributed(tmp_path):
    """One process only: test_sharded.py has the launches."""
    from benchmarks import distributed

    values = run(distributed, tmp_path, "--processes")
    assert values["processes"] == values["memory_ratio"] == 1 and values["difference"] == 0
    assert values["rows"][0]["memory"][0] > 0 and values["trained"] > 5 * values["block"]
    each = [needs(distributed.published(tmp_path), processes=n).memory for n in (2, 4, 8)]
    assert each[0] > 80e9 > each[1] > each[2]


def test_removal(tmp_path, teacher):
    values = run(removal, tmp_path, "--teacher", teacher)
    assert [row["blocks"] for row in values["single"]] == ["0", "1", "2", "3", "4", "5"]
    assert all(row["low"] <= row["error"] <= row["high"] for row in values["single"])
    assert [(m["removed"], m["kind"]) for m in values["means"]] == [
        (1, "contiguous"),
        (2, "contiguous"),
        (2, "apart"),
        (3, "contiguous"),
        (3, "apart"),
    ]
    assert {d["removed"] for d in values["differences"]} == {2, 3}
    assert (tmp_path / "removal.png").stat().st_size > 1000


def test_removal_is_the_forward_without_those_blocks(teacher):
    import torch

    from benchmarks.shared.teachers import rendered
    from ppcl_engine.models.streaming import Teacher
    from ppcl_engine.models.weights import Weights

    weights = Weights(teacher)
    source = Teacher(weights, torch.float32, "cpu", streamed=False)
    with torch.no_grad():
        embedded = source.embed(rendered(teacher, weights, 2, 2, seed=0).inputs(0))
        measured = removal.Removal(source, embedded)
        state = embedded
        for index in (0, 2, 5):
            state = source.architecture.run_block(source.block(index), state)
        velocity = source.architecture.finish(source.outer, state)
        expected = (velocity.double() - measured.target).square().flatten(1).sum(1)
        assert torch.equal(measured.squared((1, 3, 4)), expected)


def test_placements():
    assert removal.placements(4, 2, "contiguous") == [(0, 1), (1, 2), (2, 3)]
    assert removal.placements(4, 2, "apart") == [(0, 2), (0, 3), (1, 3)]
    assert [removal.name_of(p) for p in ((3,), (3, 4, 5), (3, 7))] == ["3", "3-5", "3+7"]


def test_width_forms(tmp_path, teacher):
    from benchmarks import width_forms

    values = run(width_forms, tmp_path, "--teacher", teacher)
    assert [row["form"] for row in values["rows"]] == list(width_forms.FORMS)
    assert all(row["trained"]["value"] > 0 and row["sites"] > 0 for row in values["rows"])


def test_sparsity(tmp_path):
    from benchmarks.sparsity import __main__ as sparsity
    from ppcl_engine.algorithms.sparsity import pruning

    values = run(sparsity, tmp_path, "--work", tmp_path / "work")
    names = {row["name"] for row in values["tables"]["50 %"]}
    assert {
        f"{score} {granularity}"
        for score in pruning.SCORES
        for granularity in pruning.GRANULARITIES
    } < names
    assert {"obs layer + early", "energy cluster + exchange + compensate"} < names
    for row in (row for table in values["tables"].values() for row in table):
        for name in (
            "layer_error",
            "velocity_error",
            "characters",
        ):  # the drop of a random teacher, which reads nothing, is none
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
        assert row["bytes"] < 0.8 * values["dense_bytes"]
    assert {c["theirs"] for c in values["comparisons"]} >= {
        "wanda row",
        "ria row",
        "wanda cluster",
        "obs layer",
    }
    assert (tmp_path / "sparsity.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("rows_*/*.json")}
    run(sparsity, tmp_path, "--work", tmp_path / "work")
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("rows_*/*.json")
    } == before


def test_quantization(tmp_path):
    from benchmarks import quantization

    values = run(quantization, tmp_path, "--work", tmp_path / "work")
    errors = {(row["name"], row["kind"]): row["velocity_error"]["value"] for row in values["rows"]}
    assert errors.keys() == {
        (name, kind) for name in ("full", "weights (50 %)") for kind in quantization.KINDS
    }
    assert (
        errors["full", "none"]
        < 1e-9
        < errors["full", "int8"]
        < errors["full", "fp8"]
        < errors["full", "int4"]
    )


def test_quant_aware(tmp_path):
    from benchmarks import quant_aware

    values = run(quant_aware, tmp_path, "--work", tmp_path / "work")
    rows = {tuple(row[key] for key in ("trained", "bits", "where")): row for row in values["rows"]}
    assert len(rows) == len(values["rows"]) == len(list(quant_aware.rows()))
    assert all(
        len(row["seeds"]) == 1 and row["velocity_error"]["value"] > 0 for row in rows.values()
    )
    (found,) = (d for d in values["differences"] if (d["bits"], d["where"]) == ("int4", "students"))
    aware, plain, untouched = (
        rows[trained, bits, where]["velocity_error"]["value"]
        for trained, bits, where in (
            ("int4", "int4", "students"),
            ("none", "int4", "students"),
            ("none", "none", ""),
        )
    )
    assert found["difference"]["value"] == pytest.approx(aware - plain)
    assert found["returned"] == pytest.approx((plain - aware) / (plain - untouched))


def test_bits(tmp_path):
    from benchmarks import bits

    values = run(bits, tmp_path, "--work", tmp_path / "work")
    rows = {(row["method"], row["budget"], row["refit"]): row for row in values["rows"]}
    assert len(rows) == len(values["rows"]) and {row["method"] for row in values["rows"]} == {
        "none",
        bits.PRUNED,
        bits.BITS,
        bits.BOTH,
    }
    for row in rows.values():
        assert row.get("bytes", 0) <= row["budget"]
    (whole,) = (row for row in values["rows"] if row["method"] == "none")
    assert all(whole["bytes"] > row["budget"] for row in values["rows"] if row is not whole)
    for found in values["differences"]:
        assert found["low"] <= found["value"] <= found["high"]


def test_hostile_goes_on_where_it_was_stopped(tmp_path):
    """Files alone in the quick form; no fault among them, and what was tried before is not tried
    again."""
    values = run(hostile, tmp_path, "--count", 12, "--folder", tmp_path / "runs")
    assert (values["tracebacks"], values["hangs"], values["silent"]) == (0, 0, 0), values["faults"]
    assert values["tried"] == 12 and "bundle" in values["classes"]
    lines = (tmp_path / "runs" / "done_0.jsonl").read_text().splitlines()
    assert run(hostile, tmp_path, "--count", 13, "--folder", tmp_path / "runs")["tried"] == 13
    assert (tmp_path / "runs" / "done_0.jsonl").read_text().splitlines()[:12] == lines


def test_hashing(tmp_path):
    values = run(hashing, tmp_path)
    assert values["bytes"] > 1e5
    for row in (values["disk"], values["page_cache"]):
        assert row["seconds_with"] > 0 and row.keys() >= {"share", "processor_share"}


def test_solving(tmp_path):
    values = run(solving, tmp_path)
    assert values["share"]["general_solver_and_eigenvalues"] == 1.0
    assert all(seconds >= 0 for seconds in values["seconds"].values())


def test_full_size_goes_on_where_it_was_stopped(tmp_path):
    """On a small model in this process: what every stage reads and writes is what the dry run says."""
    values = run(full_size, tmp_path, "--folder", tmp_path / "work")
    rows = values["small"]
    assert [row["stage"] for row in rows][:3] == ["calibrate", "probe", "detect"]
    assert len(rows) == 16 and all(row["read"] > 0 for row in rows)
    for row in rows:
        for name in ("read", "written"):
            if row[name] > LARGE_ENOUGH and "ratio" in row:
                assert 0.8 <= row["ratio"][name] <= 1.25, (row["stage"], name, row)
    before = (tmp_path / "work" / "rows_6.json").stat().st_mtime_ns
    run(full_size, tmp_path, "--folder", tmp_path / "work")
    assert (tmp_path / "work" / "rows_6.json").stat().st_mtime_ns == before


def test_lora_adaptation(tmp_path):
    options = ("--teachers", "qwen", "--loras", "inverted", "--work", tmp_path / "work")
    values = run(lora_adaptation, tmp_path, *options)
    (row,) = values["rows"]
    for measure in ("velocity", "pictures"):
        assert set(row[measure]["errors"]) == {"as it is", "adapted", "trained on it"}
        assert row[measure]["regained"].keys() == {"value", "low", "high"}
