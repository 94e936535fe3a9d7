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
from ppcl_engine.models.standalone import GUARD_SHAPE, standalone_structure
from ppcl_engine.models.weights import Weights
from ppcl_engine.settings.convert_settings import ImportConfig
from ppcl_engine.stages.convert.import_released import import_released
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.released_models import (
    INTERVALS,
    KEPT,
    LISTS,
    TEACHER_BLOCKS,
    TEXT,
    released_state,
    write_folder,
)

NAMES = ("1-2", "5-6")


@pytest.fixture(scope="module")
def teacher(make_model):
    return make_model(num_layers=TEACHER_BLOCKS)


@pytest.fixture(scope="module")
def base(tmp_path_factory, teacher, save_model):
    return save_model(tmp_path_factory.mktemp("base") / "base.safetensors", teacher)


@pytest.fixture
def folder(tmp_path, architecture, teacher):
    """A released folder, with changes to its tensors or lists."""

    def make(
        change=lambda state: state,
        lists: dict | None = LISTS,
        kept: list[int] = KEPT,
        model=teacher,
    ):
        lists = lists or dict.fromkeys(LISTS, [])
        config = architecture.with_blocks(architecture.tiny_config, kept)
        return write_folder(
            tmp_path / "released", change(released_state(model, kept, lists)), config, lists
        )

    return make


@pytest.fixture
def imported(tmp_path, base):
    def make(path, **settings):
        settings = {
            "base": base,
            "intervals": INTERVALS,
            "store": "float32",
            "device": "cpu",
            **settings,
        }
        return import_released(ImportConfig(path=path, run=tmp_path / "run", **settings))

    return make


@pytest.fixture
def velocity(architecture, padded_inputs):
    return lambda *path, **options: architecture.call(
        open_model(*path, **options), padded_inputs(2)
    )


@pytest.mark.parametrize("lists", [None, TEXT, LISTS], ids=["depth", "text", "both"])
def test_a_bundle_is_the_released_model(folder, imported, velocity, base, lists):
    path = folder(lists=lists)
    bundle = imported(path)
    plan = Bundle(bundle).plan
    assert [i.name for i in plan.intervals] == list(NAMES) and not plan.variants[0].tuned
    assert torch.equal(velocity(bundle, None, base), velocity(path))
    assert torch.equal(velocity(bundle, "full", base), velocity(base))


@pytest.mark.parametrize("lists", [None, LISTS], ids=["depth", "both"])
@pytest.mark.parametrize("with_base", [True, False])
def test_a_standalone_is_the_released_model(folder, imported, velocity, base, lists, with_base):
    path = folder(lists=lists)
    file = imported(path, layout="ppcl", base=base if with_base else None)
    assert torch.equal(velocity(file), velocity(path))
    structure = standalone_structure(file)
    assert structure["num_blocks"] == TEACHER_BLOCKS
    assert structure["fingerprint"] == (Weights(base).fingerprint if with_base else "")
    stored = TensorFile(file)
    blocks = [
        k
        for k in stored.keys()
        if k.startswith("transformer_blocks.") and stored.shape(k) != GUARD_SHAPE
    ]
    assert sorted({int(key.split(".")[1]) for key in blocks}) == KEPT


def test_intervals_can_be_given_back(folder, imported, base, teacher):
    """The text groups behind what was given back go off with it; a student then has the base's text
    parts."""
    bundle = imported(folder())
    opened = open_model(bundle, "1-2,ffn_image:3,ffn_text:3", base)
    student, released = opened.transformer_blocks[1].state_dict(), Released(folder())
    assert torch.equal(
        student["img_mlp.net.2.weight"], released.read("transformer_blocks.1.img_mlp.net.2.weight")
    )
    assert torch.equal(
        student["txt_mlp.net.2.weight"], teacher.transformer_blocks[1].txt_mlp.net[2].weight
    )
    assert torch.equal(
        opened.transformer_blocks[5].attn.to_q.weight,
        teacher.transformer_blocks[5].attn.to_q.weight,
    )


def test_a_cut_modulation_of_a_student_gets_its_second_half_back(folder, imported, base, teacher):
    lists = {**LISTS, "single_stream_index": [], "ehs_proj_index": [], "ffn_proj_index": [1]}
    path = folder(lists=lists)
    opened = open_model(imported(path), "1-2", base)
    bias, half = opened.transformer_blocks[1].img_mod[1].bias, 96
    assert torch.equal(bias[:half], Released(path).read("transformer_blocks.1.img_mod.1.bias"))
    assert torch.equal(bias[half:], teacher.transformer_blocks[1].img_mod[1].bias[half:])


def test_a_tuned_release_is_kept_whole(folder, imported, velocity, base, capsys):
    def tuned(state):
        state["transformer_blocks.3.attn.to_q.weight"] += 1e-3
        return state

    path = folder(tuned)
    bundle = imported(path)
    assert "transformer_blocks.4.attn.to_q.weight is not the base's" in capsys.readouterr().out
    assert Bundle(bundle).plan.variants[0].tuned
    assert torch.equal(velocity(bundle, None, base), velocity(path))
    assert torch.equal(velocity(bundle, "full", base), velocity(base))


def test_rounding_is_no_tuning(folder, imported, base):
    bundle = imported(folder(lambda state: {name: t.bfloat16() for name, t in state.items()}))
    assert not Bundle(bundle).plan.variants[0].tuned


def test_the_older_meaning_is_imported_as_ours(folder, imported, velocity, base):
    path = folder()
    bundle = imported(path, legacy_txt_proj=True)
    theirs = velocity(path, legacy_txt_proj=True)
    assert torch.equal(velocity(bundle, None, base), theirs)
    assert not torch.allclose(velocity(imported(path), None, base), theirs, rtol=1e-2)


def test_a_group_without_a_step_passes_its_text(folder, imported, velocity, base):
    path = folder(lists={**LISTS, "ehs_proj_index": []})
    assert torch.equal(velocity(imported(path), None, base), velocity(path))


def test_a_step_inside_a_group_has_no_place_in_a_plan(folder, imported):
    path = folder(
        lists={"single_stream_index": [1, 2, 4], "ehs_proj_index": [1, 2, 4], "ffn_proj_index": []}
    )
    with pytest.raises(ValueError, match="steps the text inside a text group, at block 1"):
        imported(path)


def test_the_published_intervals_need_not_be_given(
    folder, make_model, save_model, imported, velocity, tmp_path
):
    model = make_model(num_layers=60)
    base = save_model(tmp_path / "60.safetensors", model)
    kept = [
        0,
        1,
        2,
        3,
        5,
        8,
        11,
        13,
        14,
        15,
        25,
        28,
        29,
        *range(31, 43),
        44,
        45,
        48,
        50,
        51,
        52,
        54,
        56,
        58,
        59,
    ]
    text = [kept.index(block) for block in (37, 41, 51, 52, 54, 56, 58, 59)]
    steps = [kept.index(block) for block in (37, 41, 59)]
    lists = {
        "single_stream_index": text,
        "ehs_proj_index": steps,
        "ffn_proj_index": [2, *text[-2:]],
    }
    path = folder(lists=lists, kept=kept, model=model)
    bundle = imported(path, intervals="", base=base)
    groups = [group.name for group in Bundle(bundle).plan.text_groups]
    assert groups == ["text:37-37", "text:41-41", "text:51-59"]
    assert torch.equal(velocity(bundle, None, base), velocity(path))


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
    tmp_path, folder, imported, base, teacher, architecture, calibration_of, capsys, streamed
):
    calibration = calibration_of(base, batches=12)
    save_calibration(tmp_path / "c.safetensors", calibration)
    path = folder(planted, FAULT)
    broken = imported(path, name="broken")
    assert capsys.readouterr().err.count("blocks 3 5 share one text step") == 1
    settings = {"refit": True, "calibration": tmp_path / "c.safetensors", "streamed": streamed}
    repaired = imported(path, name="repaired", **settings)
    assert "share one text step" not in capsys.readouterr().err
    rows = [
        text_states(architecture, teacher, inputs, (2, 3, 4, 6))
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
    tmp_path, folder, imported, velocity, base, teacher, architecture, calibration_of, padded_inputs
):
    """Of a model in which nothing but the text of two blocks is replaced."""

    def fault(state):
        return {
            n: torch.zeros_like(t) if ".txt_proj." in n else t for n, t in planted(state).items()
        }

    save_calibration(tmp_path / "c.safetensors", calibration_of(base, batches=12))
    path = folder(
        fault,
        {"single_stream_index": [2, 5], "ehs_proj_index": [2, 5], "ffn_proj_index": []},
        list(range(8)),
    )
    right, errors = architecture.call(teacher, padded_inputs(2)), []
    for settings in ({}, {"refit": True, "calibration": tmp_path / "c.safetensors"}):
        bundle = imported(path, intervals="", **settings)
        errors.append(float((velocity(bundle, None, base) - right).square().sum()))
    assert errors[1] < 0.5 * errors[0], errors


def text_states(architecture, teacher, inputs, after) -> dict[int, torch.Tensor]:
    """Real text tokens of the teacher behind each of these blocks."""
    state, found = architecture.embed(teacher, inputs), {}
    for index, block in enumerate(teacher.transformer_blocks):
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


def test_what_does_not_fit_ends_in_one_line(
    tmp_path, folder, imported, base, save_model, make_model, calibration_of
):
    path = folder()
    other = save_model(
        tmp_path / "other.safetensors", make_model(num_layers=8, joint_attention_dim=20)
    )
    save_calibration(tmp_path / "c.safetensors", calibration_of(other))
    for settings, message in {
        "no intervals": (
            {"intervals": ""},
            "has 6 blocks, and which of the teacher's .* --intervals '3-4 8-10'",
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


def test_refit_wants_a_text_step(tmp_path, folder, imported, base, calibration_of):
    save_calibration(tmp_path / "c.safetensors", calibration_of(base))
    with pytest.raises(ValueError, match="has no text step that a block reads"):
        imported(folder(lists=None), refit=True, calibration=tmp_path / "c.safetensors")


def test_the_command_line(tmp_path, folder, base, capsys):
    arguments = [
        "import",
        "--path",
        folder(),
        "--base",
        base,
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
