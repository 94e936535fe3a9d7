"""The page of benchmarks: a column each, their mean, differences in words only where they are clear, and
what was lost most as pictures."""

from __future__ import annotations

import pytest
from PIL import Image

from ppcl_engine.report.benchmark_page import write_benchmark_page
from ppcl_engine.report.run_report import write_report
from ppcl_engine.run import Run
from ppcl_engine.system.atomic import write_json

from ..tiny.made_up_run import Page, make_run


def variant(name: str, value: float, difference: tuple[float, float] | None) -> dict:
    stat = {"value": value, "low": value - 0.1, "high": value + 0.1}
    low, high = difference or (0.0, 0.0)
    between = {"value": (low + high) / 2, "low": low, "high": high} if difference else None
    return {"name": name, "folder": name, **stat, "difference": between}


def result(lost: list[dict], *variants: dict) -> dict:
    about = {"grader": "a <judge>", "prompts": 2, "available": 9}
    return {**about, "variants": list(variants), "lost_most": lost}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = Run(make_run(tmp_path_factory.mktemp("run")))
    lost = [{"prompt": "a <b> cat", "picture": "0.png", "shares": {"full": 1.0, "small": 0.25}}]
    full, worse = variant("full", 0.8, None), variant("small", 0.5, (-0.4, -0.2))
    write_json(run.benchmark("dpg"), result(lost, full, worse))
    write_json(run.benchmark("oneig"), result([], full, variant("small", 0.7, (-0.2, 0.1))))
    for name in ("full", "small"):
        folder = run.benchmarks / "dpg" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (600, 300), "red").save(folder / "0.png")
    return run


def test_scores_stand_in_a_column_each(run):
    page = Page(write_benchmark_page(run).read_text(encoding="utf-8"))
    assert page.open == []
    for text in ("DPG-style", "OneIG-style", "2 of 9 prompts; judged by a <judge>"):
        assert text in page.text
    assert "-30.0 (-40.0 to -20.0), worse" in page.text
    assert "-5.0 (-20.0 to +10.0)" in page.text and "+10.0), " not in page.text
    assert "60.0 %" in page.text  # the mean of both benchmarks


def test_what_was_lost_most_is_shown_as_pictures(run):
    text = write_benchmark_page(run).read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 1 and "25 %" in text
    assert "a <b> cat" in Page(text).text and "No prompt lost anything" in text


def test_the_report_has_the_same_sections(run):
    assert "GenEval-style" not in (text := write_report(run.folder).read_text(encoding="utf-8"))
    assert "DPG-style: what was lost most" in text
