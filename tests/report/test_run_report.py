"""The report of a made-up run: stands alone, is escaped, and its JSON has the promised fields."""

from __future__ import annotations

import re

import pytest

from ppcl_engine.report.drawings.canvas import spread
from ppcl_engine.report.run_report import write_report
from ppcl_engine.system.atomic import read_json, write_json

from ..tiny.made_up_run import CAPTIONS, INTERVALS, Page, make_run

PNGS = ("layer_map", "cka_curves", "damage_map", "loss_curves", "velocity_error", "pictures")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run"))
    assert write_report(folder, seconds=61.0) == folder / "report.html"
    return folder


def test_page_stands_alone_and_is_escaped(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {name for name, _ in page.tags} & {"script", "link", "iframe", "i", "b"}
    assert "http" not in text and "@import" not in text and "url(" not in text
    sources = re.findall(r'src="([^"]{0,30})', text)
    assert len(sources) == 5 + 4  # the drawings but the contact sheet, and each picture by itself
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for caption in CAPTIONS:
        assert caption in page.text
    assert "small & <b>" in page.text and "<i>model</i>" in page.text


def test_columns_without_a_reader_are_left_out(run, tmp_path):
    assert "characters" not in Page((run / "report.html").read_text(encoding="utf-8")).text
    page = Page(
        write_report(make_run(tmp_path, INTERVALS[1], reader=True, bootstrap=0)).read_text(
            encoding="utf-8"
        )
    )
    assert "characters right" in page.text and "97.0 % (96.0–98.0)" in page.text
    assert "3–5" in page.text
    assert read_json(tmp_path / "report.json")["teacher"]["character_accuracy"] == pytest.approx(
        0.97
    )


def test_json_has_the_promised_fields(run):
    report = read_json(run / "report.json")
    assert report["seconds"] == 61.0
    assert (
        report["teacher"]["parameters"] == 5000 and report["teacher"]["character_accuracy"] is None
    )
    assert [(i["first"], i["last"], i["stability"]) for i in report["intervals"]] == [(1, 2, 0.5)]
    (variant,) = report["variants"]
    assert variant["name"] == "small & <b>" and variant["character_accuracy"] is None
    assert (
        variant["velocity_error"],
        variant["velocity_error_low"],
        variant["velocity_error_high"],
    ) == (
        0.5,
        0.49,
        0.51,
    )
    assert (variant["psnr"], variant["seconds_per_step"], variant["bytes"]) == (0.5, 0.02, 8000)


def test_pictures_lie_beside_it_and_are_the_same_again(run):
    before = {name: (run / f"{name}.png").read_bytes() for name in PNGS}
    assert all(png.startswith(b"\x89PNG") for png in before.values())
    write_report(run)
    assert before == {name: (run / f"{name}.png").read_bytes() for name in PNGS}
    assert read_json(run / "report.json")["seconds"] is None


@pytest.mark.parametrize("name", ["evaluate.json", "curves.safetensors", "pictures.safetensors"])
def test_missing_files_are_named(tmp_path, name):
    (make_run(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=f"{name} does not exist; run evaluate first"):
        write_report(tmp_path)


def test_evaluation_older_than_the_plan(tmp_path):
    evaluation = read_json(make_run(tmp_path) / "evaluate.json")
    evaluation["variants"][1]["name"] = "gone"
    write_json(tmp_path / "evaluate.json", evaluation)
    with pytest.raises(
        ValueError, match="evaluate.json is older than the plan.*gone.*run evaluate first"
    ):
        write_report(tmp_path)


def test_labels_are_spread_no_further_than_needed():
    assert spread([0.0, 1.0], gap=0.1) == [0.0, 1.0]
    assert spread([0.5, 0.5, 0.9], gap=0.2) == pytest.approx([0.4, 0.6, 0.9])
    assert spread([0.5, 0.5, 0.5], gap=0.1) == pytest.approx([0.4, 0.5, 0.6])
