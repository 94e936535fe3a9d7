"""Every stage on a tiny random SD3.5: joint blocks of which some attend twice to the image, and a
last one of its own."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import SD3Transformer2DModel

from ppcl_engine.__main__ import main
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.data.rendered.tables import fit_codec
from ppcl_engine.models.layout import layout_of
from ppcl_engine.models.lora import coverage
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.stored_layout import COMFYUI_PREFIX, STRUCTURE_TENSOR
from ppcl_engine.models.tensor_sources import Source, comfyui_sources
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.settings.prune_settings import DetectWidthConfig, DistillDepthConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.prune.detect_width import detect_width
from ppcl_engine.stages.prune.distill_depth import distill_depth
from ppcl_engine.system.atomic import read_json
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

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

pytestmark = pytest.mark.parametrize("architecture", ["sd35"], indirect=True)
# blocks 0, 1, 2 attend twice: the second interval goes from such blocks to others
INTERVALS = "0-1 2-4"
SITES = "text:2-5 ffn_image:0 ffn_text:0 ffn_image:5"
LAST = 5


@pytest.fixture(scope="module")
def depth(architecture, tmp_path_factory, teacher_file, make_run, run_stages) -> Run:
    """Students without corrections."""
    folder = make_run(tmp_path_factory.mktemp("sd35"), teacher_file)
    return with_students(teacher_file, folder, INTERVALS, run_stages)


@pytest.fixture(scope="module")
def run(depth, teacher_file, tmp_path_factory) -> Run:
    return finished(
        teacher_file, copied(depth, tmp_path_factory.mktemp("sd35_width") / "run"), SITES
    )


@pytest.mark.parametrize("method", ["ppcl", "budget"])
def test_the_last_block_stays(depth, teacher_file, tmp_path, method):
    settings = {"method": method, "remove": 4, "longest": 6}
    run = detected_at_any_price(depth, teacher_file, tmp_path / "run", **settings)
    assert [i.name for i in run.load_plan().intervals] == ["0-4"]
    assert measured_pairs(run) == {(u, k) for u in range(LAST) for k in range(u + 1, LAST)}
    assert "block 5 is of another kind" in "\n".join(read_json(run.detection)["explain"])


def test_the_probe_of_the_last_block_is_of_the_image(depth):
    keys = [TensorFile(path).keys() for path in sorted(depth.probes.glob("block_*.safetensors"))]
    assert len(keys) == 6 and all(any(k.startswith("text") for k in names) for names in keys[:LAST])
    assert all(k.startswith("image") for k in keys[LAST])


def test_a_student_attends_as_often_as_its_first_block(depth, teacher_file):
    for name, first in (("0-1", 0), ("2-4", 2)):
        names = {n for n in TensorFile(depth.student(name)).keys() if n.startswith("weight.")}
        block = Weights(teacher_file).block(first, torch.float32, "cpu").state_dict()
        assert names == {f"weight.{n}" for n in block} and "weight.attn2.to_q.weight" in names


def test_a_middle_block_of_another_form_is_no_start(depth, teacher_file, tmp_path):
    run = copied(depth, tmp_path / "run")
    run.students.unlink()
    config = DistillDepthConfig(
        model=teacher_file, run=run.folder, device="cpu", init="middle", correction="none"
    )
    with pytest.raises(
        ValueError,
        match="^interval 2-4: block 3, its middle, has other parts than block 2, .* first$",
    ):
        distill_depth(config)


def test_streamed_is_the_same_to_the_bit(depth, run, teacher_file, tmp_path, run_stages):
    streamed = copied(depth, tmp_path / "run")
    streamed.students.unlink()
    run_stages(teacher_file, streamed.folder, "distill_depth", correction="none", streamed=True)
    check_same_bits(run, finished(teacher_file, streamed, SITES, streamed=True))


@pytest.mark.parametrize("method", ["cka", "damage"])
def test_every_kind_of_site_is_weighed_where_it_is(depth, teacher_file, tmp_path, method):
    run = copied(depth, tmp_path / "run")
    common = {"model": teacher_file, "run": run.folder, "device": "cpu"}
    detect_width(DetectWidthConfig(**common, method=method, share=0.5, samples=6))
    assert weighed(run) == {
        "text": {2, 5},
        "ffn_image": {0, 2, 5},
        "ffn_text": {0, 2},
        "ffn_joint": set(),
    }
    assert run.load_plan().sites
    assert TensorFile(run.alignment).read("ffn_text").isfinite().tolist() == [True, True, False]


def test_given_back_parts_are_the_teachers_to_the_bit(
    run, teacher_file, model, architecture, padded_inputs
):
    check_given_back(run, teacher_file, model, architecture, padded_inputs(3))
    plan = run.load_plan()
    assert layout_of(plan, plan.everything()).sites == (
        "ffn_image:0",
        "ffn_text:0",
        "ffn_image:5",
        "text:2-5",
    )


def test_depth_alone_is_diffusers_model_with_blocks_removed(
    depth, teacher_file, architecture, padded_inputs
):
    """Its configuration lists the students that attend twice, counted anew."""
    removed, inputs = open_model(teacher_file), padded_inputs(3)
    for name in ("2-4", "0-1"):
        first, last = map(int, name.split("-"))
        removed.transformer_blocks[first].load_state_dict(own_weights(depth.student(name)))
        del removed.transformer_blocks[first + 1 : last + 1]
    expected = architecture.call(removed, inputs)
    kind = SD3Transformer2DModel
    stock, single = check_depth_alone(
        depth, teacher_file, architecture, inputs, "0-1,2-4", expected, kind
    )
    assert (stock.config.num_layers, list(stock.config.dual_attention_layers)) == (3, [0, 1])
    assert Weights(single).config["dual_attention_layers"] == [0, 1]


def test_a_variants_bytes_are_its_files(run, teacher_file, model):
    """Counted in bf16, and with the table of positions, which is not a parameter."""
    options = {"model": teacher_file, "run": run.folder, "store": "bfloat16"}
    table = model.pos_embed.pos_embed.numel()
    for name in ("small", "smallest", "tuned"):
        file = TensorFile(
            export(ExportConfig(**options, layout="ppcl", variant=name, name=f"bytes-{name}"))
        )
        stored = sum(math.prod(file.shape(n)) for n in file.keys() if n != STRUCTURE_TENSOR)
        variant = run.load_plan().variant(name)
        assert variant.bytes == 2 * stored == 2 * (variant.parameters + table), name


def test_a_controlnets_residuals_reach_a_pruned_model(
    depth, teacher_file, architecture, padded_inputs
):
    """diffusers adds them behind every block but the last: one for three blocks here, of the
    teacher's count."""
    bundle = export(ExportConfig(model=teacher_file, run=depth.folder, store="float32"))
    pruned, inputs = open_model(bundle, "2-4", teacher_file), padded_inputs(3)
    residuals = [torch.randn(6, 6, 32), torch.randn(6, 6, 32)]
    latents = architecture.unpack(inputs["hidden_states"], inputs["grid"])
    given = {name: inputs[name] for name in ("encoder_hidden_states", "pooled_projections")}
    options = {
        "timestep": 1000 * inputs["timestep"],
        "block_controlnet_hidden_states": residuals,
        "return_dict": False,
    }
    with torch.no_grad():
        whole = architecture.pack(pruned(hidden_states=latents, **given, **options)[0])
        state = architecture.embed(pruned, inputs)
        for index, block in enumerate(pruned.transformer_blocks):
            state = architecture.run_block(block, state)
            added = state.image + residuals[index // 3] if index < LAST else state.image
            state = state.with_streams(added, state.text)
        assert torch.equal(architecture.finish(pruned, state), whole)


@pytest.mark.parametrize("name", ["all", "tuned"])
def test_a_width_pruned_file_opens_as_the_bundles_variant(
    run, teacher_file, architecture, padded_inputs, name
):
    file = check_width_pruned_file(run, teacher_file, architecture, padded_inputs(3), name)
    # 9 d in the teacher
    assert file.shape("joint_blocks.0.x_block.adaLN_modulation.1.weight") == (6 * 32, 32)


def test_a_lora_report_knows_the_blocks_parts(run, architecture):
    plan = run.load_plan()
    layout = layout_of(plan, plan.everything())
    targets = [
        f"transformer_blocks.{i}.{part}.weight"
        for i in (0, 1, 5)
        for part in ("attn2.to_q", "ff.net.2")
    ]
    found = coverage(
        architecture,
        plan.config,
        [*targets, "transformer_blocks.2.norm1_context.linear.weight"],
        [],
        layout,
    )
    assert set(found.removed) == {
        "transformer_blocks.1.attn2.to_q.weight",
        "transformer_blocks.1.ff.net.2.weight",
    }
    assert "transformer_blocks.0.attn2.to_q.weight" in found.reached and found.halved == ()
    assert set(found.projected) == {
        f"transformer_blocks.{name}.weight"
        for name in ("0.ff.net.2", "5.ff.net.2", "2.norm1_context.linear")
    }


def test_a_part_that_the_last_block_has_not_is_one_line(depth, teacher_file, tmp_path, capsys):
    run = copied(depth, tmp_path / "run")
    arguments = [
        "--model",
        teacher_file,
        "--run",
        run.folder,
        "--device",
        "cpu",
        "--sites",
        "ffn_text:5",
    ]
    assert main(["distill-width", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 1
        and "ffn_text:5: block 5 does not have this part; it has: text, ffn_image" in lines[0]
    )


@pytest.fixture(scope="module")
def whole_model(architecture, make_model, tmp_path_factory):
    """A ComfyUI file with the tables of the demo's codec as text encoder and VAE."""
    model = make_model(
        in_channels=16, out_channels=16, joint_attention_dim=64, pooled_projection_dim=64
    )
    codec = fit_codec(0, positions=True, samples=64)
    sources = {
        name: Source(tuple(t.shape), lambda t=t: t) for name, t in model.state_dict().items()
    }
    tensors = {
        COMFYUI_PREFIX + name: source.read()
        for name, source in comfyui_sources(architecture, sources).items()
    }
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    write_tensors(path, {**tensors, **codec.tensors()}, codec.metadata())
    return path


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """How captions are drawn, for calibrate and evaluate."""
    captions = tmp_path_factory.mktemp("captions") / "captions.txt"
    captions.write_text(
        "a red K on a blue circle, yellow background\na blue 7 on a red square, green background\n"
    )
    return ("--steps", 2, "--guidance", 2.0, "--prompts", captions)


@pytest.fixture(scope="module")
def from_captions(architecture, whole_model, drawing, tmp_path_factory):
    """A run folder with all that the command line makes, from captions to the bundle."""
    run = tmp_path_factory.mktemp("captions") / "run"

    def ppcl(stage, *arguments):
        common = ("--model", whole_model, "--run", run, "--device", "cpu")
        assert main([stage, *map(str, (*common, *arguments))]) == 0

    ppcl("calibrate", *drawing, "--samples", 8, "--batch", 4)
    ppcl("probe")
    ppcl("detect", "--remove", 2, "--longest", 3, "--bootstrap", 4)
    ppcl("distill-depth", "--rounds", 1, "--updates", 2, "--warm-up", 1)
    ppcl("variants", "--samples", 4)
    ppcl("evaluate", *drawing, "--captions", 2, "--variants", "small")
    ppcl("export", "--name", "bundle")
    return run


def test_from_captions_to_the_report(from_captions):
    batch = load_calibration(from_captions / "calibration.safetensors").batches[0]
    assert batch["pooled_projections"].shape == (4, 64)
    full, small = json.loads((from_captions / "evaluate.json").read_text())["variants"]
    assert [full["name"], small["name"]] == ["full", "small"]
    assert small["velocity_error"]["value"] > 0
    assert full["text_sensitivity"]["value"] > 0
    assert (from_captions / "report.html").stat().st_size > 10_000


def test_the_bundle_draws(from_captions, whole_model, tmp_path):
    bundle = from_captions / "exports" / "bundle.ppcl.safetensors"
    given = ("--path", bundle, "--base", whole_model, "--prompt", "a red K")
    output = tmp_path / "picture.png"
    drawn = ("--steps", 2, "--guidance", 2.0, "--output", output)
    assert main(["generate", *map(str, (*given, *drawn))]) == 0
    assert output.stat().st_size > 1000
