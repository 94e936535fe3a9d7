"""`ppcl demo` leaves what it promises: first pictures, bundle, exports, report."""

from __future__ import annotations

import json

import pytest

from ppcl_engine.__main__ import main
from ppcl_engine.demo.bundled import TEACHER
from ppcl_engine.models.opening import open_model

NAMES = ["large", "medium", "small", "smallest"]

DEMO = ("--quick", "--captions", "3")


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory, timed_once):
    """The run folder of a quick demo."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--run", str(folder), *DEMO]) == 0
    return folder


def test_the_demo_leaves_bundle_exports_and_report(demo_run):
    report = json.loads((demo_run / "report.json").read_text())
    assert {"seconds", "teacher", "intervals", "variants"} <= report.keys()
    assert report["teacher"]["parameters"] == 8_106_176
    assert [variant["name"] for variant in report["variants"]] == NAMES
    for file in (
        "first_pictures.png",
        "report.html",
        "layer_map.png",
        "pictures.png",
        "exports/pruned.ppcl.safetensors",
        "exports/small.safetensors",
    ):
        assert (demo_run / file).stat().st_size > 1000
    assert (demo_run / "stock" / "exports" / "small-diffusers" / "config.json").exists()


def test_its_variants_are_ever_smaller(demo_run):
    bundle = demo_run / "exports" / "pruned.ppcl.safetensors"
    sizes = [
        sum(p.numel() for p in open_model(bundle, name, TEACHER).parameters())
        for name in ["full", *NAMES]
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
