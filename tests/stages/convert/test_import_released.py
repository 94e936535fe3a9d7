"""What import writes is the released model, block for block at the teacher's indices."""

from __future__ import annotations

import json

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.__main__ import USER_ERROR, main
from ppcl_engine.data.calibration import save_calibration
from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.released import Released
from ppcl_engine.models.standalone import GUARD_SHAPE, Standalone
from ppcl_engine.models.weights import Weights
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.released_models import INTERVALS, KEPT, LISTS, TEACHER_BLOCKS, TEXT

NAMES = ("1-2", "5-6")
# the teacher's blocks that the released model of 35 blocks has
PUBLISHED = [0, 1, 2, 3, 5, 8, 11, 13, 14, 15, 25, 28, 29, *range(31, 43), 44, 45, 48]
PUBLISHED += [50, 51, 52, 54, 56, 58, 59]


@pytest.mark.parametrize("lists", [None, TEXT, LISTS], ids=["depth", "text", "both"])
def test_a_bundle_is_the_released_model(released_folder, imported, velocity, released_base, lists):
    path = released_folder(lists=lists)
    bundle = imported(path)
    plan = Bundle(bundle).plan
    assert [i.name for i in plan.intervals] == list(NAMES) and not plan.variants[0].tuned
    assert torch.equal(velocity(bundle, None, released_base), velocity(path))
    assert torch.equal(velocity(bundle, "full", released_base), velocity(released_base))


@pytest.mark.parametrize("lists", [None, LISTS], ids=["depth", "both"])
@pytest.mark.parametrize("with_base", [True, False])
def test_a_standalone_is_the_released_model(
    released_folder, imported, velocity, released_base, lists, with_base
):
    path = released_folder(lists=lists)
    file = imported(path, layout="ppcl", base=released_base if with_base else None)
    assert torch.equal(velocity(file), velocity(path))
    standalone = Standalone(file)
    assert standalone.num_blocks == TEACHER_BLOCKS
    assert standalone.fingerprint == (Weights(released_base).fingerprint if with_base else "")
    stored = TensorFile(file)
    blocks = [
        k
        for k in stored.keys()
        if k.startswith("transformer_blocks.") and stored.shape(k) != GUARD_SHAPE
    ]
    assert sorted({int(key.split(".")[1]) for key in blocks}) == KEPT


def test_intervals_can_be_given_back(released_folder, imported, released_base, released_teacher):
    """The text groups behind what was given back go off with it; a student then has the base's text
    parts."""
    bundle = imported(released_folder())
    opened = open_model(bundle, "1-2,ffn_image:3,ffn_text:3", released_base)
    student, released = opened.transformer_blocks[1].state_dict(), Released(released_folder())
    assert torch.equal(
        student["img_mlp.net.2.weight"], released.read("transformer_blocks.1.img_mlp.net.2.weight")
    )
    assert torch.equal(
        student["txt_mlp.net.2.weight"],
        released_teacher.transformer_blocks[1].txt_mlp.net[2].weight,
    )
    assert torch.equal(
        opened.transformer_blocks[5].attn.to_q.weight,
        released_teacher.transformer_blocks[5].attn.to_q.weight,
    )


def test_a_cut_modulation_of_a_student_gets_its_second_half_back(
    released_folder, imported, released_base, released_teacher
):
    lists = {**LISTS, "single_stream_index": [], "ehs_proj_index": [], "ffn_proj_index": [1]}
    path = released_folder(lists=lists)
    opened = open_model(imported(path), "1-2", released_base)
    bias, half = opened.transformer_blocks[1].img_mod[1].bias, 96
    assert torch.equal(bias[:half], Released(path).read("transformer_blocks.1.img_mod.1.bias"))
    assert torch.equal(bias[half:], released_teacher.transformer_blocks[1].img_mod[1].bias[half:])


def test_a_tuned_release_is_kept_whole(released_folder, imported, velocity, released_base, capsys):
    def tuned(state):
        state["transformer_blocks.3.attn.to_q.weight"] += 1e-3
        return state

    path = released_folder(tuned)
    bundle = imported(path)
    assert (
        "transformer_blocks.4.attn.to_q.weight differs from the base's" in capsys.readouterr().out
    )
    assert Bundle(bundle).plan.variants[0].tuned
    assert torch.equal(velocity(bundle, None, released_base), velocity(path))
    assert torch.equal(velocity(bundle, "full", released_base), velocity(released_base))


def test_rounding_is_no_tuning(released_folder, imported, released_base):
    bundle = imported(
        released_folder(lambda state: {name: t.bfloat16() for name, t in state.items()})
    )
    assert not Bundle(bundle).plan.variants[0].tuned


def test_the_older_meaning_is_imported_as_ours(released_folder, imported, velocity, released_base):
    path = released_folder()
    bundle = imported(path, legacy_txt_proj=True)
    theirs = velocity(path, legacy_txt_proj=True)
    assert torch.equal(velocity(bundle, None, released_base), theirs)
    assert not torch.allclose(velocity(imported(path), None, released_base), theirs, rtol=1e-2)


def test_a_group_without_a_step_passes_its_text(released_folder, imported, velocity, released_base):
    path = released_folder(lists={**LISTS, "ehs_proj_index": []})
    assert torch.equal(velocity(imported(path), None, released_base), velocity(path))


def test_a_step_inside_a_group_has_no_place_in_a_plan(released_folder, imported):
    path = released_folder(
        lists={"single_stream_index": [1, 2, 4], "ehs_proj_index": [1, 2, 4], "ffn_proj_index": []}
    )
    with pytest.raises(ValueError, match="steps the text inside a text group, at block 1"):
        imported(path)


def test_the_published_intervals_need_not_be_given(
    released_folder, make_model, save_model, imported, velocity, tmp_path
):
    model = make_model(num_layers=60)
    released_base = save_model(tmp_path / "60.safetensors", model)
    text = [PUBLISHED.index(block) for block in (37, 41, 51, 52, 54, 56, 58, 59)]
    steps = [PUBLISHED.index(block) for block in (37, 41, 59)]
    lists = {
        "single_stream_index": text,
        "ehs_proj_index": steps,
        "ffn_proj_index": [2, *text[-2:]],
    }
    path = released_folder(lists=lists, kept=PUBLISHED, model=model)
    bundle = imported(path, intervals="", base=released_base)
    groups = [group.name for group in Bundle(bundle).plan.text_groups]
    assert groups == ["text:37-37", "text:41-41", "text:51-59"]
    assert torch.equal(velocity(bundle, None, released_base), velocity(path))


def test_what_does_not_fit_ends_in_one_line(
    tmp_path, released_folder, imported, released_base, save_model, make_model, calibration_of
):
    path = released_folder()
    other = save_model(
        tmp_path / "other.safetensors", make_model(num_layers=8, joint_attention_dim=20)
    )
    save_calibration(tmp_path / "c.safetensors", calibration_of(other))
    for settings, message in {
        "no intervals": (
            {"intervals": ""},
            "has 6 blocks; which of the teacher's .* --intervals '3-4 8-10'",
        ),
        "too many": ({"intervals": "1-3 5-6"}, "makes a teacher of 9; .* has 8"),
        "overlap": ({"intervals": "1-2 2-3"}, "intervals 1-2 and 2-3 overlap"),
        "no base": ({"base": None}, "--layout bundle needs --base"),
        "refit needs a base": (
            {"base": None, "layout": "ppcl", "refit": True},
            "--refit needs --base",
        ),
        "other base": (
            {"base": other},
            "is not the teacher of .*: joint_attention_dim is 20, not 24",
        ),
        "path as name": ({"name": "../up"}, "letters, digits"),
        "calibration": ({"refit": True}, "run calibrate first"),
        "other's": (
            {"refit": True, "calibration": tmp_path / "c.safetensors"},
            "was calibrated on another model",
        ),
    }.values():
        with pytest.raises(ValueError, match=message):
            imported(path, **settings)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_the_command_line(tmp_path, released_folder, released_base, capsys):
    arguments = [
        "import",
        "--path",
        released_folder(),
        "--base",
        released_base,
        "--run",
        tmp_path / "run",
        "--device",
        "cpu",
    ]
    arguments = [str(a) for a in arguments]
    assert main(arguments) == USER_ERROR
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("ppcl: ") and "--intervals" in errors[0]
    assert main([*arguments, "--intervals", INTERVALS]) == 0
    assert "import: " in capsys.readouterr().out
    path = tmp_path / "run" / "exports" / "released.ppcl.safetensors"
    assert main(["inspect", "--path", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variants"][0]["name"] == "released"
