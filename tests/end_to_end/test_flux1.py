"""Every stage on a tiny random FLUX: blocks of two kinds, guidance and pooled text, one
attention-and-FFN map."""

from __future__ import annotations

import pytest
from diffusers import FluxTransformer2DModel

from ppcl_engine.__main__ import main
from ppcl_engine.models.layout import layout_of
from ppcl_engine.models.lora import coverage
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.standalone import GUARD_SHAPE
from ppcl_engine.models.weights import expected_shapes
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import DetectWidthConfig
from ppcl_engine.stages.prune.detect_width import detect_width
from ppcl_engine.system.atomic import read_json
from ppcl_engine.system.tensor_files import TensorFile

from ..tiny.pruned_run import (
    check_depth_alone,
    check_given_back,
    check_same_bits,
    check_width_pruned_file,
    copied,
    detected_at_any_price,
    finished,
    measured_pairs,
    own_weights,
    weighed,
    with_students,
)

pytestmark = pytest.mark.parametrize("architecture", ["flux1"], indirect=True)
SITES = "text:1-1 ffn_image:0 ffn_joint:4 ffn_joint:7"
DOUBLES, BLOCKS = 4, 8


@pytest.fixture(scope="module")
def depth(architecture, tmp_path_factory, teacher_file, make_run, run_stages) -> Run:
    """Students for 2-3 (double) and 4-5 (single), without corrections."""
    folder = make_run(tmp_path_factory.mktemp("flux"), teacher_file)
    return with_students(teacher_file, folder, "2-3 4-5", run_stages)


@pytest.fixture(scope="module")
def run(depth, teacher_file, tmp_path_factory) -> Run:
    return finished(
        teacher_file, copied(depth, tmp_path_factory.mktemp("flux_width") / "run"), SITES
    )


@pytest.mark.parametrize("method", ["ppcl", "budget"])
def test_no_interval_goes_from_double_to_single_blocks(depth, teacher_file, tmp_path, method):
    settings = {"method": method, "remove": 5, "longest": 8}
    run = detected_at_any_price(depth, teacher_file, tmp_path / "run", **settings)
    found = run.load_plan().intervals
    assert found and all((i.first < DOUBLES) == (i.last < DOUBLES) for i in found)
    assert method == "budget" or [i.name for i in found] == ["0-3", "4-7"]
    pairs = {(u, k) for u in range(8) for k in range(u + 1, 8) if (u < 4) == (k < 4)}
    assert measured_pairs(run) == pairs
    assert "block 4 is of another kind" in "\n".join(read_json(run.detection)["explain"])


def test_streamed_is_the_same_to_the_bit(depth, run, teacher_file, tmp_path, run_stages):
    streamed = copied(depth, tmp_path / "run")
    streamed.students.unlink()
    run_stages(teacher_file, streamed.folder, "distill_depth", correction="none", streamed=True)
    check_same_bits(run, finished(teacher_file, streamed, SITES, streamed=True))


def test_every_kind_of_site_is_weighed_where_it_is(depth, teacher_file, tmp_path):
    run = copied(depth, tmp_path / "run")
    common = {"model": teacher_file, "run": run.folder, "device": "cpu"}
    for method in ("cka", "damage"):
        detect_width(DetectWidthConfig(**common, method=method, share=0.6, samples=6))
        double = {0, 1, 2}
        assert weighed(run) == {
            "text": {1, 2},
            "ffn_image": double,
            "ffn_text": double,
            "ffn_joint": {4, 6, 7},
        }
        rows = read_json(run.width)["candidates"]
        assert {r["form"] for r in rows if r["name"].startswith("ffn_joint")} == {"gated"}
        assert run.load_plan().sites
    alignment = TensorFile(run.alignment).read_all()
    assert alignment["ffn_joint"].isfinite().tolist() == [False] * 3 + [True] * 3
    with pytest.raises(ValueError, match="'heads': choose from text"):
        detect_width(DetectWidthConfig(**common, kinds="heads"))


def test_given_back_parts_are_the_teachers_to_the_bit(
    run, teacher_file, model, architecture, padded_inputs
):
    check_given_back(run, teacher_file, model, architecture, padded_inputs(3))
    plan = run.load_plan()
    assert layout_of(plan, plan.everything()).sites == (
        "ffn_image:0",
        "ffn_joint:4",
        "ffn_joint:7",
        "text:1-1",
    )


def test_depth_alone_is_diffusers_model_with_blocks_removed(
    depth, teacher_file, architecture, padded_inputs
):
    """Also across the two lists of blocks, which are numbered from 0 each."""
    removed, inputs = open_model(teacher_file), padded_inputs(3)
    for index, blocks in ((2, removed.transformer_blocks), (4, removed.single_transformer_blocks)):
        blocks[index % DOUBLES].load_state_dict(own_weights(depth.student(f"{index}-{index + 1}")))
        del blocks[index % DOUBLES + 1]
    expected = architecture.call(removed, inputs)
    kind = FluxTransformer2DModel
    stock, _ = check_depth_alone(
        depth, teacher_file, architecture, inputs, "2-3,4-5", expected, kind
    )
    assert (len(stock.transformer_blocks), len(stock.single_transformer_blocks)) == (3, 3)


@pytest.mark.parametrize("name", ["all", "tuned"])
def test_a_width_pruned_file_opens_as_the_bundles_variant(
    run, teacher_file, architecture, padded_inputs, name
):
    file = check_width_pruned_file(run, teacher_file, architecture, padded_inputs(3), name)
    assert file.shape("single_blocks.3.linear1.weight") == (96, 32)
    assert file.shape("single_blocks.3.linear2.weight") == (32, 32)
    (guard,) = [key for key in file.keys() if file.shape(key) == GUARD_SHAPE]
    full = expected_shapes(architecture, architecture.tiny_config)
    # a stock host expects another shape
    assert guard in {architecture.to_comfyui(key, full).name for key in full}


def test_a_lora_report_counts_both_kinds_of_blocks(run, architecture):
    plan = run.load_plan()
    layout = layout_of(plan, plan.everything())
    targets = [
        f"{kind}transformer_blocks.{i}.attn.to_q.weight"
        for kind in ("", "single_")
        for i in range(4)
    ]
    found = coverage(
        architecture,
        plan.config,
        [*targets, "single_transformer_blocks.3.proj_mlp.weight"],
        [],
        layout,
    )
    assert found.removed == (
        "single_transformer_blocks.1.attn.to_q.weight",
        "transformer_blocks.3.attn.to_q.weight",
    )
    assert found.projected == ("single_transformer_blocks.3.proj_mlp.weight",)


BAD = {
    "text of a single block": (
        "text:6",
        "width site text:6: block 6 does not have this part; it has: ffn_joint",
    ),
    "joint of a double block": (
        "ffn_joint:1",
        "ffn_joint:1: block 1 does not have this part; it has: text, ffn_image, ffn_text",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_its_blocks_is_one_line(depth, teacher_file, tmp_path, capsys, name):
    sites, message = BAD[name]
    run = copied(depth, tmp_path / "run")
    arguments = ["--model", teacher_file, "--run", run.folder, "--device", "cpu", "--sites", sites]
    assert main(["distill-width", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
