"""Probes: linear blocks are recovered, padding never counts, what is done is not done again."""

import json

import pytest
import torch

from ppcl_engine.algorithms.detection.stream_maps import load_probe
from ppcl_engine.data.calibration import CLEAN, CalibrationSet, load_calibration
from ppcl_engine.run import Run
from ppcl_engine.system.tensor_files import TensorFile

SIGNS = 16  # input channels whose values are +1 or -1


def report(run: Run, block: int) -> dict:
    return json.loads(TensorFile(run.probe(block)).metadata["report"])


@pytest.fixture
def linear_teacher(tmp_path, make_model, save_model, calibration_of):
    """Tokens [s, -s] of signs s have no mean and unit variance, so block 0's layer norm is the
    identity; without attention and with GELU far to the right the block is exactly x + g (B A x +
    c)."""
    model = make_model(num_layers=2)
    for linear in (model.img_in, model.txt_in):
        linear.weight.zero_(), linear.bias.zero_()
        linear.weight[:SIGNS, :SIGNS], linear.weight[SIGNS:, :SIGNS] = (
            torch.eye(SIGNS),
            -torch.eye(SIGNS),
        )
    model.txt_norm.weight.fill_(1)
    block, gate = model.transformer_blocks[0], 0.7
    for mod, mlp in ((block.img_mod, block.img_mlp), (block.txt_mod, block.txt_mlp)):
        mod[1].weight.zero_(), mod[1].bias.zero_()
        mod[1].bias[5 * 32 :] = gate
        mlp.net[0].proj.bias.fill_(20)
    teacher = save_model(tmp_path / "teacher.safetensors", model)
    calibration = calibration_of(teacher, batches=5, samples=8)
    for batch in calibration.batches:
        for name in ("hidden_states", "encoder_hidden_states"):
            batch[name] = batch[name].sign()
    return teacher, calibration, {"image": block.img_mlp, "text": block.txt_mlp}, gate


def test_an_exactly_linear_block_is_recovered(tmp_path, linear_teacher, make_run, run_stages):
    teacher, calibration, mlps, gate = linear_teacher
    run = run_stages(teacher, make_run(tmp_path / "run", teacher, calibration), "probe", ridge=1e-9)
    signs = torch.randint(0, 2, (50, SIGNS), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
    x = torch.cat([signs, -signs], 1)
    for stream, mlp in mlps.items():
        weight, bias = load_probe(run.probe(0))[stream]
        first, second = mlp.net[0].proj, mlp.net[2]
        step = gate * ((x @ first.weight.T + first.bias) @ second.weight.T + second.bias)
        torch.testing.assert_close(x @ weight.T + bias, step, rtol=1e-4, atol=1e-3)
        numbers = report(run, 0)[stream]
        assert numbers["rank"] == SIGNS  # tokens span half the width
        assert numbers["residual"] < 1e-6 and numbers["held_out"] < 1e-6
    assert report(run, 0)["image"]["rows"] == 4 * 8 * 6  # four of five batches, 8 samples, 6 tokens
    real = sum(int(batch["encoder_hidden_states_mask"].sum()) for batch in calibration.batches[:4])
    assert report(run, 0)["text"]["rows"] == real < 4 * 8 * 5


def test_padding_never_counts(tmp_path, teacher_file, calibration_of, make_run, run_stages):
    plain, noisy, other = (calibration_of(teacher_file) for _ in range(3))
    for batch in noisy.batches:
        padding = ~batch["encoder_hidden_states_mask"]
        assert padding.any()
        batch["encoder_hidden_states"][padding] *= -50
    other.batches[0]["encoder_hidden_states"][0, 0] *= -50
    runs = [
        make_run(tmp_path / name, teacher_file, c)
        for name, c in (("a", plain), ("b", noisy), ("c", other))
    ]
    a, b, c = (run_stages(teacher_file, run, "probe") for run in runs)
    for block in range(6):
        same = TensorFile(a.probe(block)).read_all()
        assert all(
            torch.equal(TensorFile(b.probe(block)).read(name), tensor)
            for name, tensor in same.items()
        )
        assert not all(
            torch.equal(TensorFile(c.probe(block)).read(name), tensor)
            for name, tensor in same.items()
        )


def test_the_last_blocks_text_is_left_out(tmp_path, teacher_file, make_run, run_stages):
    run = run_stages(teacher_file, make_run(tmp_path, teacher_file), "probe")
    assert [set(load_probe(run.probe(block))) for block in range(6)] == [{"image", "text"}] * 5 + [
        {"image"}
    ]
    assert set(report(run, 5)) == {"image"}


def test_finished_blocks_are_not_fitted_again(tmp_path, teacher_file, make_run, run_stages):
    run = run_stages(teacher_file, make_run(tmp_path, teacher_file), "probe")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.probes.iterdir()}
    run.probe(2).unlink()
    run_stages(teacher_file, tmp_path, "probe")
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.probes.iterdir()}
    assert [path.name for path in before if before[path][0] != after[path][0]] == [
        "block_002.safetensors"
    ]
    assert [path.name for path in before if before[path][1] != after[path][1]] == []
    run_stages(teacher_file, tmp_path, "probe", ridge=1e-2)
    assert all(path.read_bytes() != content for path, (_, content) in before.items())


def test_another_models_probes_are_not_taken_for_finished(
    tmp_path, teacher_file, make_model, save_model, calibration_of, make_run, run_stages
):
    """The same pictures, captions and seed give the same batches for every model."""
    other = save_model(tmp_path / "other.safetensors", make_model(seed=1))
    run = run_stages(teacher_file, make_run(tmp_path / "run", teacher_file), "probe")
    old = run.probe(1).read_bytes()
    with pytest.raises(ValueError, match="was calibrated on another model"):
        run_stages(other, run.folder, "probe")
    run_stages(other, make_run(run.folder, other, calibration_of(other)), "probe")
    assert run.probe(1).read_bytes() != old


def test_training_is_kept_only_where_it_helps(tmp_path, teacher_file, make_run, run_stages):
    plain = run_stages(teacher_file, make_run(tmp_path / "a", teacher_file), "probe")
    trained = run_stages(
        teacher_file, make_run(tmp_path / "b", teacher_file), "probe", train_steps=5
    )
    wild = run_stages(
        teacher_file,
        make_run(tmp_path / "c", teacher_file),
        "probe",
        train_steps=3,
        learning_rate=1.0,
    )
    kept = 0
    for block in range(6):
        for stream, numbers in report(trained, block).items():
            start = report(plain, block)[stream]
            assert start["held_out_trained"] is None and numbers["held_out"] == start["held_out"]
            changed = not torch.equal(
                load_probe(trained.probe(block))[stream][0],
                load_probe(plain.probe(block))[stream][0],
            )
            assert changed == (numbers["held_out_trained"] < numbers["held_out"])
            kept += changed
            assert torch.equal(
                load_probe(wild.probe(block))[stream][0], load_probe(plain.probe(block))[stream][0]
            )
    assert kept


def test_a_batch_is_held_out_of_the_fit(
    tmp_path, teacher_file, calibration_of, make_run, run_stages
):
    calibration = calibration_of(teacher_file)
    other = CalibrationSet(calibration_of(teacher_file).batches, calibration.origin)
    other.batches[-1]["hidden_states"] = other.batches[-1]["hidden_states"] * -2
    a, b = (
        run_stages(teacher_file, make_run(tmp_path / n, teacher_file, c), "probe")
        for n, c in (("a", calibration), ("b", other))
    )
    assert CLEAN in load_calibration(a.calibration).batches[0]
    assert torch.equal(load_probe(a.probe(3))["image"][0], load_probe(b.probe(3))["image"][0])
    assert report(a, 3)["image"]["held_out"] != report(b, 3)["image"]["held_out"]
    with pytest.raises(ValueError, match="has 4 batches, so 4 cannot be held out"):
        run_stages(teacher_file, a.folder, "probe", held_out=4)
