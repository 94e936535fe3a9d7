"""Every stage on a tiny random FLUX: blocks of two kinds, guidance and pooled text, one attention-and-FFN map."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel

from ppcl_engine.__main__ import main
from ppcl_engine.bundle import open_model
from ppcl_engine.checkpoint import Weights, expected_shapes
from ppcl_engine.config import (
    DetectConfig,
    DetectWidthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
    VariantsConfig,
)
from ppcl_engine.config_files import ExportConfig
from ppcl_engine.files import TensorFile, read_json, write_tensors, write_text
from ppcl_engine.layout import layout_of
from ppcl_engine.lora import coverage
from ppcl_engine.plan import parse_intervals, plan_from_json
from ppcl_engine.run import Run
from ppcl_engine.stages.detect import detect
from ppcl_engine.stages.detect_width import detect_width
from ppcl_engine.stages.distill_width import distill_width
from ppcl_engine.stages.export import export
from ppcl_engine.stages.finetune import finetune
from ppcl_engine.stages.polish import polish
from ppcl_engine.stages.variants import variants
from ppcl_engine.standalone import GUARD_SHAPE

pytestmark = pytest.mark.parametrize("architecture", ["flux1"], indirect=True)
SITES = "text:1-1 ffn_image:0 ffn_joint:4 ffn_joint:7"
DOUBLES, BLOCKS = 4, 8


def stages(teacher, run: Run, streamed: bool = False) -> Run:
    """Width, polish, variants and fine-tune of a run with students."""
    common = {"model": teacher, "run": run.folder, "device": "cpu", "streamed": streamed}
    trained = {"rounds": 1, "updates": 4, "warm_up": 1, "learning_rate": 1e-3}
    distill_width(DistillWidthConfig(**common, **trained, sites=SITES))
    polish(PolishConfig(**common, steps=3, learning_rate=1e-3, save_every=2))
    variants(VariantsConfig(**common, samples=12))
    finetune(FinetuneConfig(**common, steps=2, variant="all", name="tuned", save_every=2))
    return run


@pytest.fixture(scope="module")
def depth(architecture, tmp_path_factory, teacher_file, make_run, run_stages) -> Run:
    """Students for 2-3 (double) and 4-5 (single), without corrections."""
    run = run_stages(teacher_file, make_run(tmp_path_factory.mktemp("flux"), teacher_file), "probe", "detect")
    write_text(run.plan, run.load_plan().with_parts(intervals=parse_intervals("2-3 4-5")).to_json())
    return run_stages(teacher_file, run.folder, "distill_depth", correction="none")


def copied(depth: Run, folder) -> Run:
    run = Run(folder)
    run.folder.mkdir()
    for path in (depth.calibration, depth.students, depth.probes):
        (run.folder / path.name).symlink_to(path)
    run.plan.write_text(depth.plan.read_text())
    return run


@pytest.fixture(scope="module")
def run(depth, teacher_file, tmp_path_factory) -> Run:
    return stages(teacher_file, copied(depth, tmp_path_factory.mktemp("flux_width") / "run"))


@pytest.mark.parametrize("method", ["ppcl", "budget"])
def test_no_interval_goes_from_double_to_single_blocks(depth, teacher_file, tmp_path, method):
    run = copied(depth, tmp_path / "run")
    options = {"remove": 5, "max_drop": 10.0, "eps": 10.0, "longest": 8, "bootstrap": 3, "tokens": 3}
    detect(DetectConfig(model=teacher_file, run=run.folder, device="cpu", method=method, **options))
    found = run.load_plan().intervals
    assert found and all((i.first < DOUBLES) == (i.last < DOUBLES) for i in found)
    assert method == "budget" or [i.name for i in found] == ["0-3", "4-7"]
    cka = TensorFile(run.curves).read("cka")[:, :, 0]
    measured = {(u, u + j) for u, j in cka.isfinite().nonzero().tolist()}
    assert measured == {(u, k) for u in range(8) for k in range(u + 1, 8) if (u < 4) == (k < 4)}
    assert "block 4 is of another kind" in "\n".join(read_json(run.detection)["explain"])


def test_streamed_is_the_same_to_the_bit(depth, run, teacher_file, tmp_path, run_stages):
    streamed = copied(depth, tmp_path / "run")
    streamed.students.unlink()
    run_stages(teacher_file, streamed.folder, "distill_depth", correction="none", streamed=True)
    stages(teacher_file, streamed, streamed=True)
    names = [p.relative_to(run.folder) for folder in (run.students, run.projections, run.polished_parts, run.tuned)
             for p in sorted(folder.rglob("*.safetensors"))]  # fmt: skip
    assert len(names) > 10
    for name in names:
        ours, theirs = (TensorFile(r.folder / name).read_all() for r in (run, streamed))
        assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items()), name
    plans = [r.load_plan() for r in (run, streamed)]
    untimed = [p.with_parts(variants=tuple(replace(v, milliseconds=None) for v in p.variants)) for p in plans]
    assert untimed[0] == untimed[1]


def test_every_kind_of_site_is_weighed_where_it_is(depth, teacher_file, tmp_path):
    run = copied(depth, tmp_path / "run")
    common = {"model": teacher_file, "run": run.folder, "device": "cpu"}
    for method in ("cka", "damage"):
        detect_width(DetectWidthConfig(**common, method=method, share=0.6, samples=6))
        rows = read_json(run.width)["candidates"]
        where = {kind: {int(r["name"].split(":")[1].split("-")[0]) for r in rows if r["name"].startswith(f"{kind}:")}
                 for kind in ("text", "ffn_image", "ffn_text", "ffn_joint")}  # fmt: skip
        assert where == {"text": {1, 2}, "ffn_image": {0, 1, 2}, "ffn_text": {0, 1, 2}, "ffn_joint": {4, 6, 7}}
        assert {r["form"] for r in rows if r["name"].startswith("ffn_joint")} == {"gated"}
        assert run.load_plan().sites
    alignment = TensorFile(run.alignment).read_all()
    assert alignment["ffn_joint"].isfinite().tolist() == [False] * 3 + [True] * 3
    with pytest.raises(ValueError, match="'heads': choose from text"):
        detect_width(DetectWidthConfig(**common, kinds="heads"))


def test_given_back_parts_are_the_teachers_to_the_bit(run, teacher_file, model, architecture, padded_inputs):
    bundle = export(ExportConfig(model=teacher_file, run=run.folder, store="float32"))
    plan, inputs = run.load_plan(), padded_inputs(3)
    full = open_model(bundle, "full", teacher_file)
    assert torch.equal(architecture.call(full, inputs), architecture.call(model, inputs))
    outputs = {v.name: architecture.call(open_model(bundle, v.name, teacher_file), inputs) for v in plan.variants}
    assert len({tuple(t.flatten()[:4].tolist()) for t in outputs.values()}) > 2 and "tuned" in outputs
    assert layout_of(plan, plan.everything()).sites == ("ffn_image:0", "ffn_joint:4", "ffn_joint:7", "text:1-1")


def test_depth_alone_is_diffusers_model_with_blocks_removed(depth, run, teacher_file, architecture, padded_inputs):
    """Also across the two lists of blocks, which are numbered from 0 each."""
    run_depth = Run(depth.folder)
    variants(VariantsConfig(model=teacher_file, run=depth.folder, device="cpu", samples=12))
    common = {"model": teacher_file, "run": run_depth.folder, "store": "float32", "variant": "2-3,4-5"}
    stock = FluxTransformer2DModel.from_pretrained(export(ExportConfig(**common, layout="diffusers", name="stock")))
    assert (len(stock.transformer_blocks), len(stock.single_transformer_blocks)) == (3, 3)
    removed = open_model(teacher_file)
    for index, blocks in ((2, removed.transformer_blocks), (4, removed.single_transformer_blocks)):
        student = TensorFile(depth.student(f"{index}-{index + 1}")).read_all()
        own = {n.removeprefix("weight."): t for n, t in student.items() if n.startswith("weight.")}
        blocks[index % DOUBLES].load_state_dict(own)
        del blocks[index % DOUBLES + 1]
    inputs = padded_inputs(3)
    expected = architecture.call(removed, inputs)
    assert torch.equal(architecture.call(stock.eval(), inputs), expected)
    single = export(ExportConfig(**common, layout="comfyui", name="single"))
    assert torch.equal(architecture.call(open_model(single), inputs), expected)
    bundle = export(ExportConfig(**{**common, "layout": "bundle"}))
    assert torch.equal(architecture.call(open_model(bundle, "2-3,4-5", teacher_file), inputs), expected)


@pytest.mark.parametrize("name", ["all", "tuned"])
def test_a_width_pruned_file_opens_as_the_bundles_variant(run, teacher_file, architecture, padded_inputs, name):
    options = {"model": teacher_file, "run": run.folder, "store": "float32"}
    bundle = export(ExportConfig(**options))
    path = export(ExportConfig(**options, layout="ppcl", variant=name, name=f"file-{name}"))
    inputs = padded_inputs(3)
    expected = architecture.call(open_model(bundle, name, teacher_file), inputs)
    assert torch.equal(architecture.call(open_model(path), inputs), expected)
    file = TensorFile(path)
    assert file.shape("single_blocks.3.linear1.weight") == (96, 32)
    assert file.shape("single_blocks.3.linear2.weight") == (32, 32)
    (guard,) = [key for key in file.keys() if file.shape(key) == GUARD_SHAPE]
    full = expected_shapes(architecture, architecture.tiny_config)
    assert guard in {architecture.to_comfyui(key, full).name for key in full}  # a stock host expects another shape
    with pytest.raises(ValueError, match="has width site .* for which stock diffusers has no place"):
        export(ExportConfig(**options, layout="diffusers", variant="all"))


def test_a_lora_report_counts_both_kinds_of_blocks(run, architecture):
    plan = run.load_plan()
    layout = layout_of(plan, plan.everything())
    targets = [f"{kind}transformer_blocks.{i}.attn.to_q.weight" for kind in ("", "single_") for i in range(4)]
    found = coverage(architecture, plan.config, [*targets, "single_transformer_blocks.3.proj_mlp.weight"], [], layout)
    assert found.removed == ("single_transformer_blocks.1.attn.to_q.weight", "transformer_blocks.3.attn.to_q.weight")
    assert found.projected == ("single_transformer_blocks.3.proj_mlp.weight",)


BAD = {
    "interval": (
        {"intervals": parse_intervals("3-4"), "variants": ()},
        "interval 3-4 holds blocks of two kinds (0-3, 4-7)",
    ),
    "text of a single block": ("text:6", "width site text:6: block 6 has no such part, but ffn_joint"),
    "joint of a double block": ("ffn_joint:1", "ffn_joint:1: block 1 has no such part, but text, ffn_image, ffn_text"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_its_blocks_is_one_line(depth, teacher_file, tmp_path, capsys, name):
    changes, message = BAD[name]
    run, options = copied(depth, tmp_path / "run"), []
    if isinstance(changes, str):
        options = ["--sites", changes]
    else:
        write_text(run.plan, replace(run.load_plan(), **changes).to_json())
    arguments = ["--model", teacher_file, "--run", run.folder, "--device", "cpu", *options]
    assert main(["distill-width", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_a_plan_of_another_architecture_is_refused(run, tmp_path, capsys, teacher_file):
    plan = json.loads(run.plan.read_text())
    assert plan_from_json(json.dumps(plan)).architecture == "flux1"
    weights = Weights(teacher_file)
    with pytest.raises(ValueError, match="base.safetensors is qwen_image, the plan is for flux1; choose its base"):
        run.load_plan().check_teacher("qwen_image", weights.fingerprint, "base.safetensors")


def test_a_file_with_a_gap_in_its_blocks_is_one_line(tmp_path, model, save_model, teacher_file, capsys):
    """Blocks left out without renumbering, in either list."""
    for dropped in ("transformer_blocks.1.", "single_transformer_blocks.2."):
        state = {n: t for n, t in model.state_dict().items() if not n.startswith(dropped)}
        write_tensors(tmp_path / "gap.safetensors", state, {})
        assert main(["inspect", "--path", str(tmp_path / "gap.safetensors")]) == 2
        line = capsys.readouterr().err.splitlines()
        assert len(line) == 1 and f"lacks 1 of 8 blocks, first {dropped.rstrip('.')}: " in line[0]
