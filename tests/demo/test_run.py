"""`ppcl demo` leaves what it promises: bundle, exports, report; run again it goes on."""

from __future__ import annotations

import json

from ppcl_engine.__main__ import main
from ppcl_engine.demo.bundled import TEACHER
from ppcl_engine.models.opening import open_model


def test_the_demo_leaves_bundle_exports_and_report(tmp_path, capsys):
    assert main(["demo", "--run", str(tmp_path), "--quick", "--captions", "3"]) == 0
    assert "report.html" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"seconds", "teacher", "intervals", "variants"} <= report.keys()
    assert report["teacher"]["parameters"] == 8_106_176
    names = [variant["name"] for variant in report["variants"]]
    assert names == ["large", "medium", "small", "smallest"]
    for file in (
        "report.html",
        "layer_map.png",
        "pictures.png",
        "exports/pruned.ppcl.safetensors",
        "exports/small.safetensors",
    ):
        assert (tmp_path / file).stat().st_size > 1000
    assert (tmp_path / "stock" / "exports" / "small-diffusers" / "config.json").exists()
    bundle = tmp_path / "exports" / "pruned.ppcl.safetensors"
    sizes = [
        sum(p.numel() for p in open_model(bundle, name, TEACHER).parameters())
        for name in ["full", *names]
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]
    students = {p.name: p.read_bytes() for p in (tmp_path / "depth").iterdir()}
    assert main(["demo", "--run", str(tmp_path), "--quick", "--captions", "3"]) == 0
    assert students == {p.name: p.read_bytes() for p in (tmp_path / "depth").iterdir()}
