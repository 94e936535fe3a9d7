"""Refit fits text steps anew where an exporter wrote one block's step into another."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine.data.calibration import save_calibration
from ppcl_engine.models.bundle import Bundle

FAULT = {"single_stream_index": [2, 4], "ehs_proj_index": [2, 4], "ffn_proj_index": []}


def planted(state: dict) -> dict:
    """Groups at blocks 3 and 5-6 hold the text step of another block."""
    generator = torch.Generator().manual_seed(9)
    wrong = {
        "weight": torch.randn(32, 32, generator=generator) / 4,
        "bias": torch.randn(32, generator=generator),
    }
    changed = {n: wrong[n.rsplit(".", 1)[1]].clone() for n in state if ".ehs_proj." in n}
    return state | changed


@pytest.mark.parametrize("streamed", [False, True])
def test_refit_repairs_the_exporters_fault(
    tmp_path,
    released_folder,
    imported,
    released_base,
    released_teacher,
    architecture,
    calibration_of,
    capsys,
    streamed,
):
    calibration = calibration_of(released_base, batches=12)
    save_calibration(tmp_path / "c.safetensors", calibration)
    path = released_folder(planted, FAULT)
    broken = imported(path, name="broken")
    assert capsys.readouterr().err.count("blocks 3 5 share one text step") == 1
    settings = {"refit": True, "calibration": tmp_path / "c.safetensors", "streamed": streamed}
    repaired = imported(path, name="repaired", **settings)
    assert "share one text step" not in capsys.readouterr().err
    rows = [
        text_states(architecture, released_teacher, inputs, (2, 3, 4, 6))
        for inputs in calibration.all_inputs()
    ]
    for place, first, last in (("3", 2, 3), ("5-6", 4, 6)):
        x, y = (torch.cat([row[index] for row in rows]).double() for index in (first, last))
        weight, bias = ridge(x, y - x)
        stored = Bundle(repaired).projection(place, "text", torch.float32, "cpu")
        torch.testing.assert_close(stored["step.weight"].double(), weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stored["step.bias"].double(), bias, rtol=1e-3, atol=1e-4)
        wrong = Bundle(broken).projection(place, "text", torch.float32, "cpu")
        assert torch.equal(stored["map.weight"], wrong["map.weight"])
    assert not (tmp_path / "run" / "states" / "import").exists()


def test_the_velocity_is_closer_after_a_refit(
    tmp_path,
    released_folder,
    imported,
    velocity,
    released_base,
    released_teacher,
    architecture,
    calibration_of,
    padded_inputs,
):
    """The only fault of this model is the text of two blocks."""

    def fault(state):
        return {
            n: torch.zeros_like(t) if ".txt_proj." in n else t for n, t in planted(state).items()
        }

    save_calibration(tmp_path / "c.safetensors", calibration_of(released_base, batches=12))
    path = released_folder(
        fault,
        {"single_stream_index": [2, 5], "ehs_proj_index": [2, 5], "ffn_proj_index": []},
        list(range(8)),
    )
    right, errors = architecture.call(released_teacher, padded_inputs(2)), []
    for settings in ({}, {"refit": True, "calibration": tmp_path / "c.safetensors"}):
        bundle = imported(path, intervals="", **settings)
        errors.append(float((velocity(bundle, None, released_base) - right).square().sum()))
    assert errors[1] < 0.5 * errors[0], errors


def text_states(architecture, released_teacher, inputs, after) -> dict[int, torch.Tensor]:
    """Real text tokens of the teacher behind each of these blocks."""
    state, found = architecture.embed(released_teacher, inputs), {}
    for index, block in enumerate(released_teacher.transformer_blocks):
        state = architecture.run_block(block, state)
        found[index] = state.text[inputs["encoder_hidden_states_mask"]]
    return {index: found[index] for index in after}


def ridge(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """min |x W' + b - y|^2 + 1e-4 mean(diag x'x) |W|^2 as a least-squares problem of stacked
    rows."""
    width = x.shape[1]
    penalty = (1e-4 * x.square().sum() / width).sqrt()
    rows = torch.cat(
        [
            torch.cat([x, torch.ones(len(x), 1)], 1),
            torch.cat([penalty * torch.eye(width), torch.zeros(width, 1)], 1),
        ]
    )
    solution = torch.linalg.lstsq(rows, torch.cat([y, y.new_zeros(width, y.shape[1])])).solution
    return solution[:-1].T, solution[-1]


def test_refit_wants_a_text_step(
    tmp_path, released_folder, imported, released_base, calibration_of
):
    save_calibration(tmp_path / "c.safetensors", calibration_of(released_base))
    with pytest.raises(ValueError, match="has no text step that a block reads"):
        imported(released_folder(lists=None), refit=True, calibration=tmp_path / "c.safetensors")
