"""What `ppcl sparsify` cannot do is said in one line, and nothing is written."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine.data.calibration import load_calibration, save_calibration
from ppcl_engine.settings.convert_settings import FoldConfig
from ppcl_engine.stages.convert.fold import fold


@pytest.fixture
def failing(error_of, complete_run, tmp_path):
    """Runs a command that must fail; returns its one line."""

    def fail(*arguments) -> str:
        given = ["sparsify", "--run", tmp_path, "--device", "cpu", *arguments]
        if "--calibration" not in arguments:
            given += ["--calibration", complete_run.calibration]
        line = error_of(*given)
        assert not list(tmp_path.rglob("*.safetensors"))
        return line

    return fail


def test_what_does_not_fit_is_one_line(
    failing, teacher_file, complete_bundle, tmp_path, complete_run
):
    for sparsity in ("0", "1", "1.5", "-0.2"):
        said = failing("--path", teacher_file, "--sparsity", sparsity)
        assert "between 0 and 1" in said or "from 0 to 1" in said
    assert "2:4 drops 0.5" in failing(
        "--path", teacher_file, "--pattern", "2:4", "--sparsity", "0.6"
    )
    assert "give the base model" in failing("--path", complete_bundle)
    assert "has no variant 'small'" in failing("--path", teacher_file, "--variant", "small")
    assert "run calibrate first" in failing(
        "--path", teacher_file, "--calibration", tmp_path / "none"
    )
    assert "leaves no linear map" in failing("--path", teacher_file, "--skip", "attn mlp mod")
    assert "letters, digits" in failing("--path", teacher_file, "--name", "../sparse")
    assert "is not a calibration set" in failing(
        "--path", teacher_file, "--calibration", teacher_file
    )


def test_groups_that_do_not_divide_name_the_layer(
    failing, tmp_path_factory, make_model, save_model, calibration_of
):
    folder = tmp_path_factory.mktemp("odd")
    model = make_model(attention_head_dim=18, num_attention_heads=1, axes_dims_rope=[2, 8, 8])
    teacher = save_model(folder / "teacher.safetensors", model)
    save_calibration(folder / "calibration.safetensors", calibration_of(teacher))
    given = (
        "--path",
        teacher,
        "--pattern",
        "2:4",
        "--calibration",
        folder / "calibration.safetensors",
    )
    assert "block 0, img_mod.1 has 18 inputs, which is not a multiple of 4" in failing(*given)


def test_calibration_of_another_model(
    failing, tmp_path_factory, make_model, save_model, teacher_file, calibration_of
):
    folder = tmp_path_factory.mktemp("other")
    other = save_model(folder / "other.safetensors", make_model(seed=5))
    save_calibration(folder / "calibration.safetensors", calibration_of(other))
    line = failing("--path", teacher_file, "--calibration", folder / "calibration.safetensors")
    assert "was calibrated on another model; run calibrate on this one" in line


def test_a_layer_without_statistics(failing, complete_run, teacher_file, tmp_path_factory):
    """All text is padding: nothing that counts ever reaches the maps of the text."""
    calibration = load_calibration(complete_run.calibration)
    for batch in calibration.batches:
        batch["encoder_hidden_states_mask"] = torch.zeros_like(batch["encoder_hidden_states_mask"])
    path = tmp_path_factory.mktemp("empty") / "calibration.safetensors"
    save_calibration(path, calibration)
    line = failing("--path", teacher_file, "--calibration", path, "--score", "wanda")
    assert "block 0, attn.add_" in line and "has no statistics" in line and "--skip" in line


def test_a_folded_model(failing, teacher_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folded")
    settings = {"form": "table", "steps": "2", "dtype": "float32", "device": "cpu"}
    path = fold(FoldConfig(path=teacher_file, run=folder, **settings))
    assert "is folded; make it sparse first" in failing("--path", path)
