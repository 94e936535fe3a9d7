"""`ppcl sparsify` on every kind of file: exact shares, the same bits after kill -9, files that
every reader reads, and what does not fit in one line."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.__main__ import USER_ERROR, main
from ppcl_engine.algorithms.sparsity import blocks
from ppcl_engine.algorithms.sparsity.files import sparsity_of
from ppcl_engine.architectures import ARCHITECTURES
from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.data.calibration import load_calibration, save_calibration
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig, FoldConfig, SparsifyConfig
from ppcl_engine.stages.assess.inspect import describe
from ppcl_engine.stages.convert import sparsify as stage
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.convert.fold import fold
from ppcl_engine.stages.convert.sparsify import sparsify
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.trained_run import tuned_run

# where any will do: fast
PLAIN = {"score": "wanda", "granularity": "layer", "exchange": False, "compensate": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher_file, make_run) -> Run:
    """Students, projections of all kinds, a tuned variant, all in a bundle."""
    return tuned_run(make_run(tmp_path_factory.mktemp("run"), teacher_file), teacher_file)


@pytest.fixture(scope="module")
def bundle(run, teacher_file) -> Path:
    return export(ExportConfig(model=teacher_file, run=run.folder, store="float32"))


@pytest.fixture
def sparse(run, tmp_path):
    def make(path: Path, **settings) -> Path:
        given = {
            "calibration": run.calibration,
            "run": tmp_path,
            "device": "cpu",
            "store": "float32",
            **PLAIN,
        }
        return sparsify(SparsifyConfig(path=path, **{**given, **settings}))

    return make


def zeros(model: torch.nn.Module) -> dict[str, int]:
    """Of each linear map in a block."""
    return {
        name: int((module.weight == 0).sum())
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "blocks." in name
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
    sparse, architecture, bundle, teacher_file, padded_inputs, variant, pattern
):
    dense = open_model(bundle, variant=variant, base=teacher_file)
    model = open_model(sparse(bundle, base=teacher_file, variant=variant, pattern=pattern))
    assert zeros(model) == {n: count for n, count in zeros(model).items() if count}
    assert model.state_dict().keys() == dense.state_dict().keys()
    for name, count in zeros(model).items():
        assert count == dense.get_submodule(name).weight.numel() // 2
    ours, theirs = (drawn(architecture, m, padded_inputs()) for m in (model, dense))
    assert 0 < (ours - theirs).norm() < theirs.norm()


def test_a_standalone_is_the_variant_that_it_holds(sparse, run, bundle, teacher_file):
    alone = export(
        ExportConfig(
            model=teacher_file, run=run.folder, layout="ppcl", variant="smallest", store="float32"
        )
    )
    ours = open_model(sparse(alone, name="one")).state_dict()
    theirs = open_model(
        sparse(bundle, base=teacher_file, variant="smallest", name="other")
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


def test_metadata_and_inspect_say_what_was_done(sparse, teacher_file, bundle, run):
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
    assert found.calibration == load_calibration(run.calibration).hash
    said = describe(path)["sparse"]
    assert (
        said.startswith("unstructured by energy in cluster, 60.0 % of") and "reconstruction" in said
    )
    assert "sparse" not in describe(teacher_file)
    variant = sparse(bundle, base=teacher_file, variant="small", pattern="4:8")
    assert describe(variant)["sparse"].startswith("4:8 by wanda, 50.0 %")


@pytest.mark.parametrize("feed", ["pruned", "dense"])
def test_streamed_gives_the_same_bits(sparse, bundle, teacher_file, feed):
    given = {"base": teacher_file, "variant": "smallest", "feed": feed}
    one, other = (
        sparse(bundle, name=f"{streamed}", streamed=streamed, **given) for streamed in (False, True)
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


@pytest.mark.parametrize("feed", ["pruned", "dense"])
def test_a_run_that_was_stopped_goes_on_at_its_block(sparse, teacher_file, monkeypatch, feed):
    settings = {"score": "obs", "pattern": "2:4", "permute": True, "feed": feed}
    expected = sparse(teacher_file, name="alone", **settings).read_bytes()
    done = []

    def counted(*arguments):
        done.append(arguments[-1])
        if len(done) == 3:
            raise SystemError("killed")
        return blocks.prune_block(*arguments)

    monkeypatch.setattr(stage, "prune_block", counted)
    with pytest.raises(SystemError):
        sparse(teacher_file, name="killed", **settings)
    path = sparse(teacher_file, name="killed", **settings)
    assert done == ["block 0", "block 1", "block 2", "block 2", "block 3", "block 4", "block 5"]
    assert path.read_bytes() == expected


def test_other_settings_begin_again(sparse, teacher_file, monkeypatch):
    expected = sparse(teacher_file, name="alone", sparsity=0.7).read_bytes()
    monkeypatch.setattr(
        stage, "write_sparse", lambda *arguments: (_ for _ in ()).throw(SystemError)
    )
    with pytest.raises(SystemError):
        sparse(teacher_file, sparsity=0.5)
    monkeypatch.undo()
    assert sparse(teacher_file, sparsity=0.7).read_bytes() == expected


def test_kill_at_random_moments_changes_no_bit(sparse, teacher_file, run, tmp_path):
    begun = time.monotonic()
    expected = sparse(teacher_file, name="alone", granularity="row").read_bytes()
    seconds, moments, killed = time.monotonic() - begun, random.Random(0), 0
    while killed < 2:
        arguments = [
            "sparsify",
            "--path",
            teacher_file,
            "--calibration",
            run.calibration,
            "--run",
            tmp_path,
            "--device",
        ]
        arguments += ["cpu", "--store", "float32", "--name", f"killed_{killed}", "--score", "wanda"]
        arguments += ["--granularity", "row", "--no-exchange", "--no-compensate"]
        child = _forked([str(a) for a in arguments])
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if _finished(child) != -signal.SIGKILL:
            continue  # it had ended before the signal came; another moment
        assert _finished(_forked([str(a) for a in arguments])) == 0
        assert (tmp_path / "exports" / f"killed_{killed}.safetensors").read_bytes() == expected
        killed += 1


def _forked(arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            os._exit(main(arguments))
    return child


def _finished(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def failing(capsys, run, tmp_path):
    """Runs a command that must fail; returns its one line."""

    def fail(*arguments) -> str:
        given = ["sparsify", "--run", tmp_path, "--device", "cpu", *arguments]
        if "--calibration" not in arguments:
            given += ["--calibration", run.calibration]
        assert main([str(a) for a in given]) == USER_ERROR
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ppcl:")]
        assert len(lines) == 1 and not list(tmp_path.rglob("*.safetensors"))
        return lines[0]

    return fail


def test_what_does_not_fit_is_one_line(failing, teacher_file, bundle, tmp_path, run):
    for sparsity in ("0", "1", "1.5", "-0.2"):
        said = failing("--path", teacher_file, "--sparsity", sparsity)
        assert "between 0 and 1" in said or "from 0 to 1" in said
    assert "2:4 drops 0.5" in failing(
        "--path", teacher_file, "--pattern", "2:4", "--sparsity", "0.6"
    )
    assert "give the base model" in failing("--path", bundle)
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
    assert "block 0, img_mod.1 reads 18 numbers, which groups of 4 do not divide" in failing(*given)


def test_calibration_of_another_model(
    failing, tmp_path_factory, make_model, save_model, teacher_file, calibration_of
):
    folder = tmp_path_factory.mktemp("other")
    other = save_model(folder / "other.safetensors", make_model(seed=5))
    save_calibration(folder / "calibration.safetensors", calibration_of(other))
    line = failing("--path", teacher_file, "--calibration", folder / "calibration.safetensors")
    assert "was calibrated on another model; run calibrate on this one" in line


def test_a_layer_without_statistics(failing, run, teacher_file, tmp_path_factory):
    """All text is padding: nothing that counts ever reaches the maps of the text."""
    calibration = load_calibration(run.calibration)
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
