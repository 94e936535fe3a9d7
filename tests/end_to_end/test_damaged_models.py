"""A model with one NaN, and a calibration set with one: every stage says so in one line and writes
nothing."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ppcl_engine.__main__ import main
from ppcl_engine.demo.bundled import TEACHER, render_pictures
from ppcl_engine.models.stored_layout import COMFYUI_PREFIX
from ppcl_engine.run import Run
from ppcl_engine.system.hashes import HASHES_KEY
from ppcl_engine.system.run_lock import LOCK
from ppcl_engine.system.tensor_files import TensorFile

from ..tiny.trained_run import PlanParts, write_parts

BLOCK = 3
STAGES = {
    "probe": [],
    "detect": ["--remove", 2],
    "detect-width": [],
    "distill-depth": ["--rounds", 1, "--updates", 1],
    "distill-width": ["--rounds", 1, "--updates", 1],
    "polish": ["--steps", 1],
    "finetune": ["--steps", 1],
    "variants": [],
}
FILES = {
    "export": ["--layout", "ppcl", "--variant", "full"],
    "fold": ["--form", "table"],
    "basis": ["--form", "basis"],
    "sparsify": [],
}


def damaged(source: Path, path: Path, name: str, value: float = math.nan) -> Path:
    """A copy with one value changed, written by another library than ours."""
    with safe_open(source, "pt") as file:
        metadata = {
            name: text for name, text in (file.metadata() or {}).items() if name != HASHES_KEY
        }
    tensors = load_file(source)
    tensors[name].view(-1)[1] = value
    save_file(tensors, path, metadata)
    return path


def written(folder: Path) -> dict[str, bytes]:
    files = {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
    return {
        name: content
        for name, content in files.items()
        if not name.startswith("states") and Path(name).name != LOCK
    }


def check_nothing_bad_is_new(folder: Path, before: dict[str, bytes]) -> None:
    """Blocks before the damage may have been probed or pruned."""
    after = written(folder)
    assert before.items() <= after.items()
    for name in after.keys() - before.keys():
        assert all(t.isfinite().all() for t in TensorFile(folder / name).read_all().values()), name


@pytest.fixture(scope="module")
def bad_teacher(tmp_path_factory, teacher_file) -> Path:
    """Its fingerprint is the good one's, which only sees vectors."""
    folder = tmp_path_factory.mktemp("bad")
    return damaged(
        teacher_file,
        folder / "teacher.safetensors",
        f"transformer_blocks.{BLOCK}.img_mlp.net.0.proj.weight",
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_with_one_nan_is_refused_by_every_stage(
    error_of, tmp_path, teacher_file, bad_teacher, make_run, stage, streamed
):
    run = Run(make_run(tmp_path, teacher_file))
    write_parts(run, teacher_file)
    for folder in {
        "distill-depth": (run.students, run.projections),
        "distill-width": (run.projections,),
    }.get(stage, ()):
        shutil.rmtree(folder)
    before = written(tmp_path)
    options = [
        "--model",
        bad_teacher,
        "--run",
        tmp_path,
        "--device",
        "cpu",
        *(["--streamed"] if streamed else []),
    ]
    line = error_of(stage, *options, *STAGES[stage])
    assert "not finite" in line and "download it again" in line
    if stage in ("probe", "detect", "detect-width"):
        assert f"the model is not finite from block {BLOCK} on" in line
    check_nothing_bad_is_new(tmp_path, before)


@pytest.mark.parametrize("what", FILES)
def test_no_file_is_made_of_a_model_with_one_nan(
    error_of, tmp_path, teacher_file, bad_teacher, make_run, what
):
    """Nor of a file that was made of the good one."""
    run = Run(make_run(tmp_path / "run", teacher_file))
    write_parts(run, teacher_file)
    stage = "fold" if what == "basis" else what
    if stage == "export":
        options = ["--model", bad_teacher, "--run", run.folder]
    else:
        options = ["--path", bad_teacher, "--run", run.folder, "--device", "cpu"]
    if stage == "fold":
        folder = tmp_path / "modulation"
        folder.mkdir()
        weight = f"transformer_blocks.{BLOCK}.img_mod.1.weight"
        options[1] = damaged(teacher_file, folder / "teacher.safetensors", weight)
    before = written(tmp_path)
    line = error_of(stage, *options, *FILES[what])
    assert "not finite" in line and str(BLOCK) in line
    check_nothing_bad_is_new(tmp_path, before)
    assert not (run.folder / "exports").exists() or not list((run.folder / "exports").iterdir())


@pytest.fixture(scope="module")
def bad_demo(tmp_path_factory) -> Path:
    """A damaged copy of the demo's teacher, which comes with its codec."""
    path = tmp_path_factory.mktemp("demo") / "teacher.safetensors"
    return damaged(
        TEACHER, path, f"{COMFYUI_PREFIX}transformer_blocks.{BLOCK}.img_mlp.net.0.proj.weight"
    )


@pytest.fixture
def captions(tmp_path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("a red K on a blue circle, yellow background\n")
    return path


def test_generate_writes_no_picture_of_noise(error_of, tmp_path, bad_demo):
    picture = tmp_path / "a.png"
    caption = "a red K on a blue circle, yellow background"
    line = error_of(
        "generate", "--path", bad_demo, "--prompt", caption, "--output", picture, "--device", "cpu"
    )
    assert "the model at t = 1: velocity is not finite" in line and not picture.exists()


def test_evaluate_reports_no_figures_of_noise(error_of, tmp_path, bad_demo, captions):
    common = ["--model", TEACHER, "--run", tmp_path, "--device", "cpu"]
    small = ["--samples", 2, "--batch", 2, "--steps", 1]
    assert main([str(a) for a in ["calibrate", *common, "--prompts", captions, *small]]) == 0
    write_parts(
        Run(tmp_path), TEACHER, parts=PlanParts(depth=(), width=(), projections={}, variants=())
    )
    line = error_of("evaluate", "--model", bad_demo, *common[2:], "--captions", 1, "--steps", 1)
    assert "variant 'full': velocity is not finite" in line
    assert not (tmp_path / "evaluate.json").exists()


@pytest.mark.parametrize("source", ["prompts", "images"])
def test_calibrate_names_the_block(error_of, tmp_path, bad_demo, captions, source):
    given = captions if source == "prompts" else render_pictures(tmp_path / "images", 2, 0)
    options = ["--samples", 2, "--batch", 2, "--steps", 1, "--device", "cpu"]
    line = error_of(
        "calibrate", "--model", bad_demo, "--run", tmp_path / "run", f"--{source}", given, *options
    )
    assert f"the model is not finite from block {BLOCK} on" in line and "download it again" in line
    assert not (tmp_path / "run" / "calibration.safetensors").exists()


def test_calibrate_looks_at_the_layers_before_the_blocks_too(error_of, tmp_path, captions):
    path = damaged(TEACHER, tmp_path / "teacher.safetensors", f"{COMFYUI_PREFIX}img_in.weight")
    options = ["--samples", 2, "--batch", 2, "--steps", 1, "--device", "cpu"]
    line = error_of(
        "calibrate", "--model", path, "--run", tmp_path / "run", "--prompts", captions, *options
    )
    assert "the model, before its first block: image is not finite" in line


@pytest.mark.parametrize("name", ["text", "empty"])
def test_stored_embeddings_with_one_nan_are_refused(error_of, tmp_path, teacher_file, name):
    tensors = {
        "text": torch.randn(2, 5, 24),
        "empty": torch.randn(1, 2, 24),
        "mask": torch.ones(2, 5),
    }
    tensors[name].view(-1)[3] = math.nan
    path = tmp_path / "embeddings.safetensors"
    save_file(tensors, path)
    size = ["--height", 64, "--width", 64, "--samples", 2, "--steps", 1, "--device", "cpu"]
    line = error_of(
        "calibrate", "--model", teacher_file, "--run", tmp_path / "run", "--embeddings", path, *size
    )
    assert (
        f"{path}: encoder_hidden_states is not finite" in line
        and "encode the captions again" in line
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_calibration_set_with_one_nan_is_refused_by_every_stage(
    error_of, tmp_path, teacher_file, make_run, stage
):
    run = Run(make_run(tmp_path, teacher_file))
    write_parts(run, teacher_file)
    damaged(run.calibration, run.calibration, "1.encoder_hidden_states")
    before = written(tmp_path)
    line = error_of(
        stage, "--model", teacher_file, "--run", tmp_path, "--device", "cpu", *STAGES[stage]
    )
    assert (
        f"{run.calibration}, batch 1: encoder_hidden_states is not finite" in line
        and "run calibrate again" in line
    )
    assert written(tmp_path) == before


def test_sparsify_refuses_such_a_set_too(error_of, tmp_path, teacher_file, make_run):
    run = Run(make_run(tmp_path, teacher_file))
    damaged(run.calibration, run.calibration, "0.hidden_states", math.inf)
    line = error_of("sparsify", "--path", teacher_file, "--run", tmp_path, "--device", "cpu")
    assert "batch 0: hidden_states is not finite" in line and "run calibrate again" in line
