"""A format for each matrix under a budget of bytes, with intervals under the same one; weights that make up
for rounding; what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.models.opening import open_model
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.system.atomic import read_json


@pytest.fixture(scope="module")
def run(complete_run, tmp_path_factory) -> Run:
    """The same parts, with damages of the intervals: one is worth replacing at once, one never."""
    run = Run(tmp_path_factory.mktemp("bits"))
    shutil.copytree(complete_run.folder, run.folder, dirs_exist_ok=True)
    plan = run.load_plan()
    scored = [replace(i, score=s) for i, s in zip(plan.intervals, (1e6, 1e-9), strict=True)]
    run.plan.write_text(plan.with_parts(intervals=tuple(scored)).to_json())
    return run


@pytest.fixture(scope="module")
def exported(run, teacher_file):
    """Exports in chosen formats; returns the file."""

    def make(layout: str, budget: float = 0.0, **options):
        given = {"store": "mixed", "name": layout, "device": "cpu", **options}
        common = {"model": teacher_file, "run": run.folder, "layout": layout, "budget_gb": budget}
        return export(ExportConfig(**common, **given))

    return make


@pytest.fixture(scope="module")
def velocity_error(run, teacher_file, architecture):
    """Of a file, relative and squared, on the calibration set, against a variant of the run."""
    inputs = load_calibration(run.calibration).all_inputs()[-1]

    @torch.no_grad()
    def measure(path, exact) -> float:
        ours, theirs = (architecture.call(open_model(p), inputs) for p in (path, exact))
        return float((ours - theirs).square().sum() / theirs.square().sum())

    return measure


def test_a_budget_is_kept_and_the_damage_is_near_the_predicted(exported, velocity_error):
    exact = exported("ppcl", variant="3-4", store="float32", name="exact")
    path = exported("ppcl", 3.1e-4, variant="3-4")
    report = read_json(path.with_suffix(".bits.json"))
    assert 0.9 * 310_000 < path.stat().st_size == report["bytes"] <= 310_000
    assert len(report["matrices"]) > 1 and report["intervals"] == ["3-4"]
    measured, predicted = velocity_error(path, exact), report["predicted_damage"]
    assert 0.3 * measured < predicted < 3 * measured


def test_intervals_and_bits_share_one_budget(exported, teacher_file, velocity_error):
    path = exported("gguf", 3e-4, variant="auto", refit=True)
    report = read_json(path.with_suffix(".bits.json"))
    assert report["intervals"] == ["3-4"] and path.stat().st_size <= 300_000
    exact = exported("ppcl", variant="3-4", store="float32", name="exact")
    assert velocity_error(path, exact) < 0.1


def test_refit_leaves_a_smaller_error_in_the_same_bytes(exported, velocity_error):
    common = {"variant": "3-4", "store": "nvfp4"}
    exact = exported("ppcl", variant="3-4", store="float32", name="exact")
    plain = exported("comfyui", **common, name="plain")
    fitted = exported("comfyui", **common, name="fitted", refit=True)
    assert abs(plain.stat().st_size - fitted.stat().st_size) < 500  # digits in the header
    assert velocity_error(fitted, exact) < 0.9 * velocity_error(plain, exact)


def test_a_tuned_variant_with_width_sites_has_formats_too(exported):
    path = exported("ppcl", 2.4e-4, variant="smallest_tuned", name="tuned")
    assert path.stat().st_size <= 240_000 and open_model(path)


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("--budget-gb 0.0001 is too small: the smallest file of these formats has 0.000", {}),
        ("--budget-gb 0.0001 has nothing to choose with --store int8", {"store": "int8"}),
        ("--store mixed needs --budget-gb", {"budget": 0.0}),
        ("--store mixed is not for --layout bundle", {"layout": "bundle"}),
        ("--refit does nothing for --store int8", {"store": "int8", "budget": 0.0, "refit": True}),
        (
            "--refit is not for --layout bundle",
            {"layout": "bundle", "store": "mxfp8", "budget": 0.0, "refit": True},
        ),
    ],
)
def test_what_does_not_belong_together(exported, line, options):
    with pytest.raises(ValueError, match=line) as error:
        exported(**{"layout": "comfyui", "budget": 1e-4, "variant": "3-4", **options})
    assert "\n" not in str(error.value)


def test_what_is_missing(run, complete_run, exported, teacher_file, tmp_path, line_of):
    common = ["export", "--model", teacher_file, "--layout", "ppcl", "--store", "mixed"]
    common += ["--budget-gb", "0.0003"]
    unmeasured = [*common, "--run", complete_run.folder, "--variant", "auto"]
    assert "run variants first, or name a variant" in line_of(*unmeasured)
    shutil.copy(run.plan, tmp_path / "plan.json")
    line = line_of(*common, "--run", tmp_path, "--variant", "full")
    assert "calibration.safetensors does not exist; run calibrate first" in line
