"""The report of a real run with width sites: what is drawn, told and counted; and the chart of a
benchmark's tables."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from benchmarks.ablation.chart import ablation_chart
from ppcl_engine.plan import Variant, parse_intervals, parse_sites
from ppcl_engine.report.drawings.canvas import BLUE, VERMILION
from ppcl_engine.report.drawings.layer_map import layer_map
from ppcl_engine.report.run_report import write_report
from ppcl_engine.report.width_section import read_width
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import DetectWidthConfig, DistillWidthConfig
from ppcl_engine.stages.prune.detect_width import detect_width
from ppcl_engine.stages.prune.distill_width import distill_width
from ppcl_engine.system.atomic import read_json, write_json, write_text
from ppcl_engine.system.tensor_files import write_tensors

from ..tiny.made_up_run import Page, evaluated
from ..tiny.plans import plan_of

SITES = "text:2-3 ffn_image:0 ffn_text:4"
# 2-3 runs as the teacher's blocks, for which nothing was trained
GIVEN_BACK = "4-5,text:2-3,ffn_image:0"
NOTE = "text:2-3 is off: no projection was trained for block 2"


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher_file, make_run, run_stages) -> Run:
    """Width detected, then other sites named by hand and trained a little; the pictures are made
    up."""
    run = run_stages(
        teacher_file, make_run(tmp_path_factory.mktemp("width"), teacher_file), "probe", "detect"
    )
    write_text(run.plan, run.load_plan().with_parts(intervals=parse_intervals("2-3 4-5")).to_json())
    run_stages(teacher_file, run.folder, "distill_depth", rounds=1, updates=2)
    common = {"model": teacher_file, "run": run.folder, "device": "cpu"}
    detect_width(DetectWidthConfig(**common, share=0.55))
    distill_width(
        DistillWidthConfig(**common, sites=SITES, give_back=False, rounds=1, updates=4, warm_up=2)
    )
    run_stages(teacher_file, run.folder, "variants")
    plan = run.load_plan()
    tuned = Variant(
        name="tuned",
        **{k: getattr(plan.everything(), k) for k in ("intervals", "sites")},
        tuned=True,
    )
    write_text(run.plan, plan.with_parts(variants=(*plan.variants, tuned)).to_json())
    names = ("full", "smallest", GIVEN_BACK, "tuned")
    rows = [evaluated(name, 9000 - 1000 * i, False, teacher=not i) for i, name in enumerate(names)]
    shown = {
        "captions": 1,
        "captions_shown": ["a"],
        "steps": 1,
        "guidance": 1.0,
        "seed": 0,
        "seconds": 1.0,
    }
    write_json(run.evaluation, {**shown, "device": "cpu", "machine": "m", "variants": rows})
    pictures = {name: torch.zeros(1, 3, 16, 16, dtype=torch.uint8) for name in names}
    write_tensors(run.folder / "pictures.safetensors", pictures)
    write_report(run.folder)
    return run


def test_json_has_the_sites_and_what_is_really_on(run):
    report = read_json(run.folder / "report.json")
    assert [(s["name"], s["kind"], s["form"]) for s in report["sites"]] == [
        ("ffn_image:0", "ffn_image", "paper"),
        ("ffn_text:4", "ffn_text", "paper"),
        ("text:2-3", "text", "paper"),
    ]
    smallest, given_back, tuned = report["variants"]
    assert (
        smallest["intervals"] == ["2-3", "4-5"]
        and len(smallest["sites"]) == 3
        and not smallest["notes"]
    )
    assert given_back["intervals"] == ["4-5"] and given_back["sites"] == ["ffn_image:0"]
    assert given_back["notes"] == [NOTE] and (given_back["tuned"], tuned["tuned"]) == (False, True)


def test_page_tells_about_sites(run):
    page = Page(run.report.read_text(encoding="utf-8"))
    assert f"{GIVEN_BACK}: {NOTE}" in page.text
    assert (
        "named by hand" in page.text
        and "variance explained" in page.text
        and "width sites" in page.text
    )
    # blocks, then sites that are on
    assert "smallest43" in page.text and f"{GIVEN_BACK}51" in page.text
    assert "tunedfine-tuned43" in page.text
    for name in ("width_alignment", "width_candidates"):
        assert (run.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_trained_site_has_its_loss_and_its_candidate(run):
    width = read_width(run, run.load_plan())
    assert {name: len(losses) for name, losses in width.losses.items()} == {
        "ffn_image:0": 1,
        "ffn_text:4": 1,
        "text:2-3": 1,
    }
    assert all(len(values) == 4 for losses in width.losses.values() for values in losses)
    site = run.load_plan().site("ffn_image:0")
    assert width.candidate(site)["saving"] > 0 and width.candidate(site)["form"] == "paper"


def test_without_detection_there_is_no_such_section(run, tmp_path):
    for path in run.folder.iterdir():
        if path.name not in ("width.json", "report.html", "report.json") and path.suffix != ".png":
            (tmp_path / path.name).symlink_to(path)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "variance explained" not in page.text and NOTE in page.text
    assert not (tmp_path / "width_alignment.png").exists()


def has_colour(png: bytes, colour: str) -> bool:
    wanted = tuple(bytes.fromhex(colour[1:]))
    return wanted in {
        pixel for _, pixel in Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 24)
    }


def test_the_layer_map_draws_what_is_on():
    plan = plan_of(
        intervals=parse_intervals("2-3"), sites=parse_sites("text:2-3 ffn_image:5 ffn_text:7")
    )
    maps = {}
    for name, intervals, sites in (
        ("everything", ("2-3",), ("text:2-3", "ffn_image:5")),
        ("no text", ("2-3",), ("ffn_image:5",)),
        ("off with its interval", (), ("text:2-3", "ffn_image:5")),
        ("never on", (), ("ffn_image:5",)),
    ):
        variant = Variant(name="x", intervals=intervals, sites=sites)
        maps[name] = layer_map(plan, [variant], {"x": 5}, 10)
    assert [has_colour(png, VERMILION) for png in maps.values()] == [True, False, False, False]
    assert maps["off with its interval"] == maps["never on"]


def test_tables_of_a_benchmark():
    rows = [
        {"name": name, "drop_percent": drop, "low": drop - 1, "high": drop + 1}
        for name, drop in (("ours", -0.4), ("cka_sequential", 18.2))
    ]
    assert has_colour(ablation_chart({"equal_parameters": rows, "ladder": rows[1:]}), BLUE)
    assert not has_colour(ablation_chart({"ladder": rows[1:]}), BLUE)
