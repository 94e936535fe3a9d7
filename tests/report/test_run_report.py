"""The report of a made-up run: stands alone, is escaped, and its JSON has the promised fields."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from ppcl_engine.plan import Interval, PruningPlan, Variant
from ppcl_engine.report.drawings.canvas import spread
from ppcl_engine.report.run_report import write_report
from ppcl_engine.system.atomic import read_json, write_json, write_text
from ppcl_engine.system.tensor_files import write_tensors

CAPTIONS = ["<script>alert(1)</script>", 'five $dollars$ & "quotes" 一只猫 \\frac{']
BLOCKS, LONGEST, SAMPLES = 6, 4, 5
ACCURACIES = ("character_accuracy", "shape_accuracy", "colour_accuracy")
PNGS = ("layer_map", "cka_curves", "damage_map", "loss_curves", "velocity_error", "pictures")
INTERVALS = ((1, 2),), ((1, 2), (3, 5))


def stat(value: float) -> dict:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def evaluated(name: str, parameters: int, reader: bool, teacher: bool) -> dict:
    row = {
        "name": name,
        "parameters": parameters,
        "bytes": 2 * parameters,
        "flops": 1e9 * parameters,
    }
    row |= {
        "seconds_per_step": 0.02,
        "latency_ratio": 1.0,
        "peak_memory_bytes": 10**8,
        "text_sensitivity": stat(0.2),
    }
    for field in ("velocity_error", "latent_psnr", "psnr", "ssim"):
        row[field] = None if teacher else stat(0.5)
    row["velocity_error_by_timestep"] = (
        None if teacher else [{"t": t, **stat(0.1)} for t in (0.25, 0.75)]
    )
    return row | {name: stat(0.97) if reader else None for name in ACCURACIES}


def make_run(folder, intervals=INTERVALS[0], reader=False, bootstrap=3):
    parts = tuple(
        Interval(first=u, last=v, score=0.1, stability=0.5, parameters=900) for u, v in intervals
    )
    names = tuple(i.name for i in parts)
    variants = (
        Variant(name="full", parameters=5000),
        Variant(name="small & <b>", intervals=names, parameters=4000),
    )
    plan = PruningPlan(
        architecture="qwen_image",
        config={"num_layers": BLOCKS},
        num_blocks=BLOCKS,
        fingerprint="f" * 64,
        intervals=parts,
        variants=variants,
        provenance={
            "tool": "ppcl",
            "source_model": "<i>model</i>",
            "calibration": "c" * 64,
            "seed": 0,
        },
    )
    write_text(folder / "plan.json", plan.to_json())
    pairs = torch.arange(BLOCKS)[:, None] + torch.arange(LONGEST) < BLOCKS
    pairs[:, 0] = False
    cka = torch.where(pairs[..., None], torch.rand(BLOCKS, LONGEST, 1 + bootstrap), torch.nan)
    error = torch.where(pairs[..., None], torch.rand(BLOCKS, LONGEST, SAMPLES), torch.nan)
    curves = {"cka": cka.double(), "error": error.double(), "power": torch.ones(SAMPLES).double()}
    write_tensors(
        folder / "curves.safetensors",
        curves,
        {"settings": json.dumps({"calibration": "c", "longest": LONGEST, "bootstrap": bootstrap})},
        gaps=True,
    )
    found = [{"first": u, "last": v, "score": 0.2, "stability": 0.5} for u, v in intervals]
    write_json(
        folder / "detect.json",
        {"method": "budget", "intervals": found, "explain": ["D > 0.1 & so on"]},
    )
    for name in names:
        write_tensors(folder / "depth" / f"{name}.safetensors", {"losses": torch.rand(50)})
    rows = [
        evaluated("full", 5000, reader, teacher=True),
        evaluated("small & <b>", 4000, reader, teacher=False),
    ]
    settings = {
        "captions": 2,
        "steps": 4,
        "guidance": 2.0,
        "seed": 0,
        "seconds": 9.5,
        "device": "cpu",
        "machine": "a & b",
    }
    settings |= {"versions": {"torch": "2"}, "captions_shown": CAPTIONS, "variants": rows}
    write_json(folder / "evaluate.json", settings)
    pictures = {row["name"]: torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8) for row in rows}
    write_tensors(folder / "pictures.safetensors", pictures)
    return folder


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in ("meta", "img"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text += data


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
