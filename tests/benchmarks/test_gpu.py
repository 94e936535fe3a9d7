"""The GPU's benchmark in its quick form, on the CPU: every part runs, what is done is not done again,
and what goes wrong is a row that says so."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import detecting, models, sparse, tuning
from benchmarks.gpu.card import Card
from benchmarks.gpu.formats import int8_codes, to_float8, to_int8
from benchmarks.gpu.scale import FULL, QUICK
from benchmarks.gpu.table import HEADER
from ppcl_engine.algorithms.distillation.quantization import rounded
from ppcl_engine.models.cost import CostModel
from ppcl_engine.plan import Interval

from .quick import run

SIDE, TOKENS = QUICK.sides[0], QUICK.text_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def values(folder):
    return run(gpu, folder, "--folder", folder / "work")


@pytest.fixture
def benchmark(tmp_path):
    """Measures in a child that is a few characters of Python."""
    card = Card(device="cpu", name="a card", memory=24_000_000_000)

    def make(code: str) -> gpu.Benchmark:
        command = [sys.executable, "-S", "-c", code]
        return gpu.Benchmark(card=card, scale=QUICK, folder=tmp_path, child=command)

    return make


def test_every_part_has_all_of_its_rows(values):
    assert values["parts"].keys() == gpu.PARTS.keys()
    step = values["parts"]["step"]
    assert [name.rpartition(", ")[0] for name in step] == [*QUICK.forms, "full, again"]
    for part, rows in values["parts"].items():
        for name, row in rows.items():
            if row not in (sparse.NO_KERNELS, tuning.NOT_STREAMED):
                assert row["seconds"] > 0, (part, name)


def test_the_table_can_be_pasted(values):
    title, empty, header, line, *rows = values["table"]
    assert title.startswith("CPU, ") and empty == ""
    assert header == f"| {' | '.join(HEADER)} |" and set(line) == set("|- ")
    assert {row.split(" | ")[0] for row in rows} == {f"| {part}" for part in gpu.PARTS}
    assert all(row.count("|") == header.count("|") for row in rows)
    whole = next(row for row in rows if row.startswith("| detect | 60 blocks"))
    assert "extrapolated" in whole or "cut" in whole


def test_it_goes_on_where_it_was_stopped(values, folder):
    (path,) = (folder / "work").glob("*/rows.json")
    done = json.loads(path.read_text())
    lost = done["step"].pop(f"10 B, {SIDE} x {SIDE}")
    path.write_text(json.dumps(done))
    again = run(gpu, folder, "--folder", folder / "work")["parts"]
    found = again["step"].pop(f"10 B, {SIDE} x {SIDE}")
    assert again == done and found["flops"] == lost["flops"] and found != lost


def test_without_a_gpu_it_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--folder", str(tmp_path)])
    assert "no GPU that torch sees" in capsys.readouterr().err.splitlines()[-1]


def test_a_process_that_ends_in_a_row_cuts_it_and_the_others_go_on(benchmark):
    found = benchmark("import sys; sys.exit('out of luck')")
    found.finish("detect")
    reasons = [row["cut"] for row in found.rows.of("detect").values()]
    assert reasons == ["exit code 1: out of luck (detect.log)"] * 2
    assert "cut: one of the two was" in found.table()


def test_a_part_ends_when_its_time_is_over(benchmark, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT", 0.3)
    found = benchmark("import time; time.sleep(60)")
    found.finish("step")
    first, *others = (row["cut"] for row in found.rows.of("step").values())
    assert first.startswith("not done when the part's")
    assert len(others) == len(QUICK.forms) and set(others) == {"the part's 0.005 minutes were over"}


def test_a_card_with_too_little_memory_skips_the_row(benchmark, monkeypatch):
    def rows(*_):
        return {"large": fail, "small": lambda: {"seconds": 1.0}}

    def fail():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(gpu.PARTS, "step", SimpleNamespace(rows=rows))
    found = benchmark("")
    found.measure("step")
    assert found.rows.of("step") == {
        "large": {"cut": "more memory than this card's 24.0 GB"},
        "small": {"seconds": 1.0},
    }


@pytest.mark.parametrize(
    "memory, storage", [(24e9, "float8"), (40e9, "float8"), (80e9, "bfloat16")]
)
def test_the_full_model_is_stored_so_that_it_fits(memory, storage):
    assert round(FULL.parameters / 1e9, 2) == 20.43
    card = Card(device="cpu", name="a card", memory=int(memory))
    assert card.storage(FULL.parameters) == storage


def test_the_forms_are_the_published_ones():
    assert FULL.forms == tuple(models.FORMS) and set(QUICK.forms) < set(FULL.forms)
    places = {name: form.layout(FULL.config).places for name, form in models.FORMS.items()}
    counts = {"full": 60, "41 blocks": 41, "35 blocks": 35, "10 B": 35, "folded": 60, "int8": 60}
    assert {name: len(found) for name, found in places.items()} == counts
    narrow = [place for place in places["10 B"] if place.text_source is not None]
    assert [place.last for place in narrow] == [37, 41, 51, 53, 55, 57, 58, 59]


def test_a_student_costs_what_a_block_does():
    """So forms are counted without their intervals."""
    cost = CostModel(models.QWEN, QUICK.config, models.grid_of(SIDE), TOKENS)
    assert cost.student(Interval(first=3, last=4)).flops == cost.block(3).flops > 0


@pytest.mark.parametrize("shape", [(1, 64), (2, 33, 64)])
def test_int8_maps_are_exact_products_of_rounded_numbers(shape):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32).bfloat16(), torch.randn(shape).bfloat16()
    weight, bias = linear.weight.detach().float(), linear.bias.detach().float()
    codes, scale = int8_codes(x.reshape(-1, 64))
    torch.testing.assert_close(codes * scale, rounded(x.float().reshape(-1, 64), 8))
    expected = rounded(x.float(), 8) @ rounded(weight, 8).T + bias
    to_int8(linear)
    assert linear.weight.dtype is torch.int8 and linear(x).shape == expected.shape
    torch.testing.assert_close(linear(x).float(), expected, atol=2e-2, rtol=2e-2)


def test_a_converted_map_keeps_its_hooks():
    """Without them a text group would have no source."""
    for convert in (to_float8, to_int8):
        linear, seen = nn.Linear(64, 32).bfloat16(), []
        linear.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given))
        convert(linear)
        linear(torch.randn(1, 64).bfloat16())
        assert len(seen) == 1 and linear.weight.dtype.itemsize == 1


def test_the_time_of_all_blocks_follows_from_two_smaller_models():
    rows = [detecting.work(blocks, 8) for blocks in (6, 12, detecting.ALL_BLOCKS)]
    few, more, whole = ({**row, "seconds": 2 * row["passes"] + 3 * row["maps"]} for row in rows)
    assert detecting.extrapolated(few, more)["seconds"] == pytest.approx(whole["seconds"])
    assert "cut" in detecting.extrapolated({**few, "seconds": 1e6}, more)


@pytest.mark.gpu
@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_row_on_a_gpu(part, tmp_path):
    """The quick form's sizes; PyTorch's kernels and the allocator's peaks are the real ones."""
    rows = gpu.PARTS[part].rows(Card.of("cuda"), QUICK, tmp_path)
    found = {name: measure() for name, measure in rows.items()}
    for name, row in found.items():
        assert "cut" in row or row["seconds"] > 0, name
        assert row.get("peak", 1) > 0, name
