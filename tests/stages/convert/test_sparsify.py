"""`ppcl sparsify` on every kind of file: exact shares, and files that every reader reads."""

from __future__ import annotations

import json

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.algorithms.sparsity.files import sparsity_of
from ppcl_engine.architectures import ARCHITECTURES
from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.data.calibration import load_calibration, save_calibration
from ppcl_engine.models.weights import Weights
from ppcl_engine.settings.convert_settings import ExportConfig, SparsifyConfig
from ppcl_engine.stages.assess.inspect import describe
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.convert.sparsify import sparsify
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.sparsity import PLAIN


def zeros(model: torch.nn.Module) -> dict[str, int]:
    """How many zeros each linear map in a block has."""
    return {
        name: int((module.weight == 0).sum())
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "blocks." in name and "fusion" not in name
    }


def drawn(architecture, model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return architecture.call(model, inputs)


def test_a_full_model_loses_its_share_in_every_layer_and_nothing_else(
    sparse, architecture, teacher_file, padded_inputs
):
    path = sparse(teacher_file, sparsity=0.3)
    model, dense = open_model(path), open_model(teacher_file)
    weights = {
        name: module.weight.numel()
        for name, module in dense.named_modules()
        if name in zeros(dense)
    }
    assert zeros(model) == {name: round(0.3 * count) for name, count in weights.items()}
    for name, tensor in dense.state_dict().items():
        ours, stays = model.state_dict()[name], model.state_dict()[name] != 0
        assert torch.equal(ours[stays], tensor[stays])
        assert bool(stays.all()) or name.removesuffix(".weight") in weights
    ours, theirs = (drawn(architecture, m, padded_inputs()) for m in (model, dense))
    assert 0 < (ours - theirs).norm() < 0.5 * theirs.norm()
    report = json.loads(path.with_suffix(".json").read_text())
    assert report["dropped"] == sum(zeros(model).values()) and len(report["layers"]) == len(weights)
    assert not (path.parents[1] / "sparsified" / "sparse").exists()


@pytest.mark.parametrize("variant", ["small", "smallest", "smallest_tuned", "full", "1-2,text:3-4"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_variants_of_a_bundle(
    sparse, architecture, complete_bundle, teacher_file, padded_inputs, variant, pattern
):
    dense = open_model(complete_bundle, variant=variant, base=teacher_file)
    model = open_model(sparse(complete_bundle, base=teacher_file, variant=variant, pattern=pattern))
    assert zeros(model) == {n: count for n, count in zeros(model).items() if count}
    assert model.state_dict().keys() == dense.state_dict().keys()
    for name, count in zeros(model).items():
        assert count == dense.get_submodule(name).weight.numel() // 2
    ours, theirs = (drawn(architecture, m, padded_inputs()) for m in (model, dense))
    assert 0 < (ours - theirs).norm() < theirs.norm()


def test_a_standalone_is_the_variant_that_it_holds(
    sparse, complete_run, complete_bundle, teacher_file
):
    alone = export(
        ExportConfig(
            model=teacher_file,
            run=complete_run.folder,
            layout="ppcl",
            variant="smallest",
            store="float32",
        )
    )
    ours = open_model(sparse(alone, name="one")).state_dict()
    theirs = open_model(
        sparse(complete_bundle, base=teacher_file, variant="smallest", name="other")
    ).state_dict()
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_two_of_four_is_compressed_and_read_as_dense(sparse, teacher_file, tmp_path):
    path = sparse(teacher_file, pattern="2:4", permute=True, store="bfloat16")
    dense_size = sparse(teacher_file, name="loose", store="bfloat16").stat().st_size
    assert path.stat().st_size < 0.75 * dense_size
    model = open_model(path)
    for name in zeros(model):
        assert int((model.get_submodule(name).weight != 0).reshape(-1, 4).sum(1).max()) <= 2
    raw = TensorFile(path)
    assert "transformer_blocks.0.attn.to_q.weight" in raw.entries
    said = describe(path)["sparse"]
    assert (
        said.startswith("2:4 by wanda, 50.0 % of")
        and "compressed" in said
        and "another order" in said
    )


def test_a_sparse_model_can_be_made_sparse_again(sparse, teacher_file):
    path = sparse(teacher_file, pattern="2:4")
    again = sparse(path, pattern="2:4", name="again")
    ours, theirs = (open_model(p).state_dict() for p in (again, path))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_stock_host_stops_at_a_compressed_file(sparse, teacher_file):
    """It would load what it finds and leave the rest uninitialised."""
    from safetensors import safe_open

    with safe_open(sparse(teacher_file, pattern="2:4"), framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    (guard,) = [name for name, shape in shapes.items() if shape == [0, 1]]
    assert guard in Weights(teacher_file).keys()


def test_metadata_and_inspect_say_what_was_done(
    sparse, teacher_file, complete_bundle, complete_run
):
    path = sparse(
        teacher_file,
        sparsity=0.6,
        timesteps="early",
        skip="mlp",
        score="energy",
        granularity="cluster",
    )
    found = sparsity_of(TensorFile(path).metadata)
    assert (found.pattern, found.sparsity, found.score, found.granularity) == (
        "unstructured",
        0.6,
        "energy",
        "cluster",
    )
    assert "2607.00927" in found.note and found.timesteps == "early"
    assert not found.exchange and not found.compensate
    assert found.calibration == load_calibration(complete_run.calibration).hash
    said = describe(path)["sparse"]
    assert (
        said.startswith("unstructured by energy in cluster, 60.0 % of") and "reconstruction" in said
    )
    assert "sparse" not in describe(teacher_file)
    variant = sparse(complete_bundle, base=teacher_file, variant="small", pattern="4:8")
    assert describe(variant)["sparse"].startswith("4:8 by wanda, 50.0 %")


@pytest.mark.parametrize("feed", ["pruned", "dense"])
def test_streamed_gives_the_same_bits(sparse, complete_bundle, teacher_file, feed):
    given = {"base": teacher_file, "variant": "smallest", "feed": feed}
    one, other = (
        sparse(complete_bundle, name=f"{streamed}", streamed=streamed, **given)
        for streamed in (False, True)
    )
    assert one.read_bytes() == other.read_bytes()


def test_feeds_differ_behind_the_first_block(sparse, teacher_file):
    one, other = (
        open_model(sparse(teacher_file, name=feed, feed=feed)).state_dict()
        for feed in ("pruned", "dense")
    )
    name = "transformer_blocks.{}.img_mlp.net.2.weight"
    assert torch.equal(one[name.format(0)], other[name.format(0)])
    assert not torch.equal(one[name.format(5)], other[name.format(5)])


def test_what_is_skipped_stays_dense(sparse, teacher_file):
    counts = zeros(open_model(sparse(teacher_file, skip="_mod attn")))
    assert all((count == 0) == ("_mod" in name or "attn" in name) for name, count in counts.items())


def test_an_edit_model_stays_one(make_model, save_model, calibration_of, tmp_path):
    """Its conditioning has two rows a sample; ComfyUI knows it by a mark."""
    teacher = save_model(tmp_path / "teacher.safetensors", make_model(zero_cond_t=True))
    save_calibration(tmp_path / "calibration.safetensors", calibration_of(teacher))
    given = {
        "calibration": tmp_path / "calibration.safetensors",
        "run": tmp_path,
        "device": "cpu",
        **PLAIN,
    }
    path = sparsify(SparsifyConfig(path=teacher, **given))
    assert open_model(path).config["zero_cond_t"] and set(QwenImage.marks) <= set(
        TensorFile(path).keys()
    )
    assert all(zeros(open_model(path)).values())


@pytest.mark.parametrize("architecture", [a.name for a in ARCHITECTURES], indirect=True)
def test_every_architecture(
    architecture, make_model, save_model, calibration_of, padded_inputs, tmp_path
):
    teacher = save_model(tmp_path / "teacher.safetensors", make_model())
    save_calibration(tmp_path / "calibration.safetensors", calibration_of(teacher))
    for pattern, permute in (("unstructured", False), ("2:4", True)):
        given = {
            "calibration": tmp_path / "calibration.safetensors",
            "run": tmp_path,
            "device": "cpu",
            **PLAIN,
        }
        path = sparsify(
            SparsifyConfig(path=teacher, pattern=pattern, permute=permute, store="float32", **given)
        )
        model, dense = open_model(path), open_model(teacher)
        assert zeros(model).keys() == zeros(dense).keys()
        assert all(
            2 * count == model.get_submodule(name).weight.numel()
            for name, count in zeros(model).items()
        )
        ours, theirs = (drawn(architecture, m, padded_inputs()) for m in (model, dense))
        assert 0 < (ours - theirs).norm() < theirs.norm()
