"""`ppcl demo --teacher flux` and run files with --tiny, on a tiny random teacher half as deep as the
bundled one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ppcl_engine.__main__ import main, read_run_file
from ppcl_engine.data.rendered.tables import fit_codec
from ppcl_engine.demo import bundled
from ppcl_engine.demo.run import REMOVE
from ppcl_engine.demo.train import KINDS, Recipe, save_teacher
from ppcl_engine.estimate.needs import needs
from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.opening import open_model

CONFIGS = Path(__file__).parents[2] / "configs"
REAL = {
    "flux_dev_8b": ("flux1_dev", "flux"),
    "qwen_image_10b": ("qwen_image", "qwen"),
    "sd35_large": ("sd35_large", "qwen"),
    "z_image": ("z_image", "qwen"),
    "qwen_image_21": ("qwen_image_21", "qwen"),
}
SMALL = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": [2, 6, 8]}
SMALL |= {"num_layers": 4, "num_single_layers": 8}
REMOVED = REMOVE["flux"] // 2
pytestmark = pytest.mark.parametrize("architecture", ["flux1"], indirect=True)


@pytest.fixture
def teacher(architecture, make_model, tmp_path, monkeypatch):
    """Stands where the bundled FLUX teacher is."""
    kind = replace(KINDS["flux"], config={**KINDS["flux"].config, **SMALL})
    tensors = dict(make_model(**kind.config).named_parameters())
    path = tmp_path / "teacher_flux.safetensors"
    save_teacher(
        kind, path, Recipe(teacher="flux"), 0, tensors, fit_codec(0, kind.numbered, samples=64)
    )
    monkeypatch.setitem(bundled.TEACHERS, "flux", path)
    monkeypatch.setitem(REMOVE, "flux", REMOVED)
    return path


def test_the_demo_runs_on_flux_and_goes_on(teacher, timed_once, tmp_path, capsys):
    run = tmp_path / "run"
    given = ["--teacher", "flux", "--run", str(run), "--quick", "--captions", "3"]
    assert main(["demo", *given]) == 0
    assert "report.html" in capsys.readouterr().out
    report = json.loads((run / "report.json").read_text())
    assert [v["name"] for v in report["variants"]] == ["large", "medium", "small", "smallest"]
    bundle = run / "exports" / "pruned.ppcl.safetensors"
    plan = Bundle(bundle).plan
    assert plan.architecture == "flux1"
    assert {s.kind for s in plan.sites} & {"ffn_joint", "ffn_image", "ffn_text"}
    doubles = SMALL["num_layers"]
    assert all((i.first < doubles) == (i.last < doubles) for i in plan.intervals)
    sizes = [
        sum(p.numel() for p in open_model(bundle, n, teacher).parameters())
        for n in ("full", "small", "smallest")
    ]
    assert sizes == sorted(sizes, reverse=True)
    stock = json.loads((run / "stock/exports/small-diffusers/config.json").read_text())
    assert stock["_class_name"] == "FluxTransformer2DModel"
    assert stock["num_layers"] + stock["num_single_layers"] == 12 - REMOVED
    # run again it goes on: nothing is trained anew
    folders = ("depth", "width", "polished", "stock/depth")
    files = [p for name in folders for p in (run / name).rglob("*.safetensors")]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert len(before) > 8
    assert main(["demo", *given]) == 0
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_teacher_that_is_not_there_is_one_line(architecture, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bundled.TEACHERS, "flux", tmp_path / "none.safetensors")
    assert main(["demo", "--teacher", "flux", "--run", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert (
        line.count("\n") == 1
        and "make it with `python -m ppcl_engine.demo.train --teacher flux`" in line
    )


@pytest.mark.parametrize("name", REAL)
def test_a_shipped_run_file_holds_settings_for_one_large_gpu(architecture, name):
    path, (model, _) = CONFIGS / f"{name}.toml", REAL[name]
    stages = read_run_file(path)
    names = [stage for stage, _ in stages]
    assert names[:3] == ["calibrate", "probe", "detect"] and {
        "distill-depth",
        "distill-width",
        "export",
    } <= set(names)
    calibrate = replace(stages[0][1], model=Path(model))
    for _, config in stages:
        wanted = needs(replace(config, model=Path(model)), calibrate)
        assert wanted.memory < 48e9 and wanted.disk < 60e9, wanted


def test_a_shipped_run_file_runs_tiny(teacher, timed_once, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(CONFIGS / "flux_dev_8b.toml"), "--tiny"]) == 0
    run = tmp_path / "runs" / "flux_dev_8b_tiny"
    bundle = run / "exports" / "pruned.ppcl.safetensors"
    assert (run / "report.html").exists() and bundle.exists()
    # 10 of 57 blocks in the file
    assert sum(i.removed for i in Bundle(bundle).plan.intervals) == 2


def test_tiny_needs_to_know_the_teacher(architecture, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(
        '[common]\nmodel = "m"\nrun = "r"\n[probe]\n[tiny]\nteacher = "sdxl"\n'
    )
    assert main(["run", str(tmp_path / "run.toml"), "--tiny"]) == 2
    assert (
        "[tiny] in the run file, with teacher = one of 'qwen', 'flux' and blocks"
        in capsys.readouterr().err
    )
