"""A benchmark is drawn by every variant and judged, goes on where it stopped, and has its page."""

from __future__ import annotations

import json

import pytest

from ppcl_engine.__main__ import main
from ppcl_engine.run import Run
from ppcl_engine.stages import benchmark

from ...tiny.benchmark_files import dpg_file, tiny_judge
from ...tiny.memory import check_one_model_at_a_time
from ...tiny.pruned_run import copied
from ...tiny.qwen_image_folder import DRAWING, SIZE


@pytest.fixture(scope="module")
def judged(pipeline, pipeline_run, tmp_path_factory) -> tuple[Run, list[str]]:
    """A run that was judged on a few prompts, one model in memory at a time, and the command."""
    folder = tmp_path_factory.mktemp("judged")
    run = copied(pipeline_run, folder / "run")
    common = ("evaluate", "--model", pipeline, "--run", run.folder, "--device", "cpu")
    given = ("--benchmark", "dpg", "--prompts", dpg_file(folder), "--variants", "small")
    judge = ("--judge", tiny_judge(folder / "judge"), "--batch", 2)
    command = [str(part) for part in (*common, *given, *judge, *SIZE, *DRAWING)]
    with pytest.MonkeyPatch.context() as patched:
        transformers = check_one_model_at_a_time(patched)
        assert main(command) == 0 and len(transformers) == 2
    return run, command


def test_teacher_and_variants_have_scores_and_differences(judged):
    run, _ = judged
    result = json.loads(run.benchmark("dpg").read_text())
    teacher, small = result["variants"]
    assert (teacher["name"], teacher["difference"], small["name"]) == ("full", None, "small")
    assert 0 <= small["value"] <= 1 and result["prompts"] == result["available"] == 3
    difference = small["difference"]
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert difference["value"] == pytest.approx(small["value"] - teacher["value"])
    text = run.benchmark_page.read_text()
    assert "DPG-style" in text and "judged by qwen2_5_vl" in text


def test_nothing_is_drawn_or_judged_twice(judged, monkeypatch):
    run, command = judged
    before = run.benchmark("dpg").read_bytes()
    for name in ("draw_rows", "grade"):
        monkeypatch.delattr(benchmark, name)
    assert main(command) == 0 and run.benchmark("dpg").read_bytes() == before


def test_other_steps_are_drawn_anew(judged, monkeypatch, error_of):
    _, command = judged

    def stop(*_):
        raise ValueError("drawn anew")

    monkeypatch.setattr(benchmark, "draw_rows", stop)
    assert "drawn anew" in error_of(*command, "--steps", "4")


def test_what_is_missing_is_said_before_anything_is_drawn(judged, error_of, tmp_path):
    _, command = judged
    start = command[: command.index("--judge")]
    assert "needs a judge" in error_of(*start)
    without = [*start[: start.index("--prompts")], *start[start.index("--variants") :]]
    assert "--prompts dpg_bench.csv" in error_of(*without)
    assert "name it with --benchmark" in error_of(
        *start[: start.index("--benchmark")], "--judge", tmp_path
    )
