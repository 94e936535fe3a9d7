"""Every stage on a tiny random Qwen-Image 2.1: text, then image, in one sequence, modulated by one
map for all blocks."""

from __future__ import annotations

import pytest
from diffusers import QwenImage21Transformer2DModel

from ppcl_engine.__main__ import main
from ppcl_engine.models.layout import layout_of
from ppcl_engine.models.opening import open_model
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import DetectWidthConfig
from ppcl_engine.stages.prune.detect_width import detect_width
from ppcl_engine.system.tensor_files import TensorFile

from ..tiny.pruned_run import (
    check_depth_alone,
    check_given_back,
    check_width_pruned_file,
    copied,
    finished,
    own_weights,
    weighed,
    with_students,
)

pytestmark = pytest.mark.parametrize("architecture", ["qwen_image_21"], indirect=True)
INTERVALS, SITES = "1-2 4-5", "ffn_joint:0 ffn_joint:4"


@pytest.fixture(scope="module")
def depth(architecture, tmp_path_factory, teacher_file, make_run, run_stages) -> Run:
    """Students without corrections."""
    folder = make_run(tmp_path_factory.mktemp("qwen21"), teacher_file)
    return with_students(teacher_file, folder, INTERVALS, run_stages)


@pytest.fixture(scope="module")
def run(depth, teacher_file, tmp_path_factory, run_stages) -> Run:
    """Students with corrections, projections, and a tuned variant."""
    run = copied(depth, tmp_path_factory.mktemp("qwen21_width") / "run")
    run.students.unlink()
    run_stages(teacher_file, run.folder, "distill_depth", correction="affine", rounds=1)
    return finished(teacher_file, run, SITES)


def test_image_and_text_have_probes_and_corrections_of_their_own(depth, run):
    """The last block's text is read by nothing."""
    probes = [TensorFile(path).keys() for path in sorted(depth.probes.glob("block_*.safetensors"))]
    streams = [{key.split(".")[0] for key in keys} for keys in probes]
    assert streams == [{"image", "text"}] * 5 + [{"image"}]
    for name, expected in (("1-2", {"image", "text"}), ("4-5", {"image"})):
        file = TensorFile(run.student(name))
        corrected = {key.split("maps.")[1].split(".")[0] for key in file.keys() if "maps." in key}
        assert corrected == set(file.about("fit", dict)) == expected


def test_variants_of_a_bundle(run, teacher_file, model, architecture, padded_inputs):
    check_given_back(run, teacher_file, model, architecture, padded_inputs(3))
    plan = run.load_plan()
    assert layout_of(plan, plan.everything()).sites == ("ffn_joint:0", "ffn_joint:4")


@pytest.mark.parametrize("name", ["all", "tuned"])
def test_a_width_pruned_file_opens_as_the_bundles_variant(
    run, teacher_file, architecture, padded_inputs, name
):
    file = check_width_pruned_file(run, teacher_file, architecture, padded_inputs(3), name)
    assert file.shape("transformer_blocks.0.img_mlp.weight") == (64, 64)
    assert file.shape("transformer_blocks.3.img_mlp.gate_up.weight") == (384, 64)
    assert "transformer_blocks.1.correction.maps.text.weight" in file.keys()


def test_depth_alone_is_diffusers_model_with_blocks_removed(
    depth, teacher_file, architecture, padded_inputs
):
    removed, inputs = open_model(teacher_file), padded_inputs(3)
    for first in (4, 1):
        student = own_weights(depth.student(f"{first}-{first + 1}"))
        removed.transformer_blocks[first].load_state_dict(student)
        del removed.transformer_blocks[first + 1]
    expected = architecture.call(removed, inputs)
    kind = QwenImage21Transformer2DModel
    stock, single = check_depth_alone(
        depth, teacher_file, architecture, inputs, "1-2,4-5", expected, kind
    )
    assert len(stock.transformer_blocks) == 4
    blocks = {key.split(".")[1] for key in TensorFile(single).keys() if "img_mlp.gate_up" in key}
    assert blocks == set("0123")  # ComfyUI counts them by name


def test_both_forms_are_weighed(depth, teacher_file, tmp_path):
    run = copied(depth, tmp_path / "run")
    common = {"model": teacher_file, "run": run.folder, "device": "cpu"}
    detect_width(DetectWidthConfig(**common, method="damage", share=0.6, samples=6))
    assert weighed(run)["ffn_joint"] == {0, 1, 3, 4}
    assert {site.form for site in run.load_plan().sites} <= {"paper", "gated"}


def test_a_text_site_is_one_line(depth, teacher_file, tmp_path, line_of):
    run = copied(depth, tmp_path / "run")
    common = ["--model", teacher_file, "--run", run.folder, "--device", "cpu"]
    assert "text:3: block 3 does not have this part; it has: ffn_joint" in line_of(
        "distill-width", *common, "--sites", "text:3"
    )


def test_dry_run_of_the_full_size(architecture, capsys, tmp_path):
    arguments = ["--model", architecture.name, "--run", str(tmp_path), "--dry-run"]
    assert main(["distill-depth", *arguments]) == 0
    assert "32 blocks, 7.12 B" in capsys.readouterr().out
