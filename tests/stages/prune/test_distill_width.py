"""Width: closed forms over the whole set, trained further, resumed to the bit, switched with no
training."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from ppcl_engine.algorithms.distillation import rounds
from ppcl_engine.algorithms.distillation.trainer import saved_weights
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.models.assembly import open_variant, placed_block
from ppcl_engine.models.layout import Place, layout_of
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.interruption import Stopped
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.distilled_width import distil


def projection_files(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.projections.iterdir())}


def ffn_rows(architecture, model, block, index: int, stream: str, form: str, batches):
    """What the FFN of a block at this index reads and gives, over all batches: [tokens, width] each,
    in float64."""
    xs, ys = [], []
    for inputs in batches:
        state = architecture.embed(model, inputs)
        for before in range(index):
            state = architecture.run_block(model.transformer_blocks[before], state)
        _, seen = architecture.observe(block, state)
        if form == "gated":
            x, y = seen[f"{stream}_ffn_input"], seen[f"{stream}_ffn_output"]
        else:
            x = seen[f"{stream}_before_ffn"]
            y = seen[f"{stream}_after_ffn"] - x
        xs.append(x[state.real(stream)])
        ys.append(y[state.real(stream)])
    return torch.cat(xs).double(), torch.cat(ys).double()


def ridge(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the ridge regression of y on x, its penalty relative to each column."""
    centred, target = x - x.mean(0), y - y.mean(0)
    penalty = torch.diag(1e-4 * centred.square().sum(0))
    weight = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ target).T
    return weight, y.mean(0) - weight @ x.mean(0)


@pytest.mark.parametrize("form", ["paper", "gated"])
def test_the_start_is_the_ridge_solution_over_the_whole_set(
    width_run, teacher_file, architecture, form
):
    """An FFN of the teacher's block, one of a student, and text, against plain linear algebra."""
    run = distil(width_run(), teacher_file, rounds=0, form=form)
    weights, model = Weights(teacher_file), open_model(teacher_file)
    students = RunStudents(run, weights.config, architecture)
    intervals = {i.first: i for i in run.load_plan().intervals}
    batches = list(load_calibration(run.calibration).all_inputs())
    for name, index, stream in (
        ("0.ffn_image", 0, "image"),
        ("4-5.ffn_image", 4, "image"),
        ("1.ffn_text", 1, "text"),
    ):
        place = Place(index=index, interval=intervals.get(index) if "-" in name else None)
        block = placed_block(weights, students, place, torch.float32, "cpu", {})
        weight, bias = ridge(*ffn_rows(architecture, model, block, index, stream, form, batches))
        saved = saved_weights(run.projections / f"{name}.safetensors")
        torch.testing.assert_close(saved["map.weight"].double(), weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(saved["map.bias"].double(), bias, rtol=1e-3, atol=1e-3)


def test_training_lowers_every_loss_and_leaves_the_rest_alone(width_run, teacher_file):
    # four times over the same ten batches
    run = distil(width_run(), teacher_file, rounds=1, updates=40)
    names = {path.stem for path in run.projections.iterdir()}
    assert names == {
        "2-3.text",
        "2.text",
        "3.text",
        "0.ffn_image",
        "4-5.ffn_image",
        "4.ffn_image",
        "1.ffn_text",
    }
    for path in run.projections.iterdir():
        file = TensorFile(path)
        losses = file.read("losses")
        assert int(file.metadata["step"]) == 40 and losses[-10:].mean() < losses[:10].mean(), (
            path.name
        )
    assert set(saved_weights(run.projections / "2-3.text.safetensors")) == {
        "map.weight",
        "map.bias",
        "step.weight",
        "step.bias",
    }
    assert "step.weight" not in saved_weights(run.projections / "2.text.safetensors")


def test_interrupted_training_ends_in_the_same_bits(width_run, teacher_file, monkeypatch):
    whole = projection_files(distil(width_run("whole"), teacher_file))
    run, calls = width_run("stopped"), []

    @contextmanager
    def stops_at_once():
        yield lambda: calls.append(1) or len(calls) % 5 == 0

    monkeypatch.setattr(rounds, "stop_on_interrupt", stops_at_once)
    stops = 0
    while True:
        try:
            distil(run, teacher_file)
            break
        except Stopped:
            stops += 1
    assert stops > 5 and projection_files(run) == whole


def test_streamed_and_resident_are_the_same_bits(width_run, teacher_file):
    resident = distil(width_run("resident"), teacher_file)
    streamed = distil(width_run("streamed"), teacher_file, streamed=True, cache_gb=1e-3)
    resident = distil(width_run("small_cache"), teacher_file, cache_gb=1e-3)
    assert projection_files(streamed) == projection_files(resident)
    assert not list(streamed.states.glob("*"))


def test_sites_switch_without_training(width_run, teacher_file, architecture, padded_inputs):
    """Every subset opens from the bundle; giving back an interval inside a group uses its blocks'
    own projections."""
    run = distil(width_run(), teacher_file)
    plan = run.load_plan()
    bundle = export(ExportConfig(model=teacher_file, run=run.folder, store="float32"))
    inputs, full = padded_inputs(3), open_model(teacher_file)
    assert torch.equal(
        architecture.call(open_model(bundle, "full", teacher_file), inputs),
        architecture.call(full, inputs),
    )
    students = RunStudents(run, Weights(teacher_file).config, architecture)
    seen = []
    for name in (
        "2-3,4-5,text:2-3,ffn_image:0,ffn_image:4,ffn_text:1",
        "4-5,text:2-3",
        "text:2-3",
        "ffn_image:4",
        "2-3",
    ):
        variant = plan.variant(name)
        assert not layout_of(plan, variant).notes
        ours = open_variant(Weights(teacher_file), students, plan, variant, torch.float32, "cpu")
        opened = open_model(bundle, name, teacher_file)
        seen.append(architecture.call(opened, inputs))
        assert torch.equal(architecture.call(ours, inputs), seen[-1])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_standalone_with_everything_on_is_the_variant(
    width_run, teacher_file, architecture, padded_inputs
):
    run = distil(width_run(), teacher_file)
    name = ",".join([*run.load_plan().everything().intervals, *run.load_plan().everything().sites])
    bundle = export(ExportConfig(model=teacher_file, run=run.folder, store="float32"))
    path = export(
        ExportConfig(
            model=teacher_file,
            run=run.folder,
            layout="ppcl",
            variant=name,
            store="float32",
            name="one",
        )
    )
    ours, inputs = open_model(path), padded_inputs(3)
    assert torch.equal(
        architecture.call(ours, inputs),
        architecture.call(open_model(bundle, name, teacher_file), inputs),
    )
    with pytest.raises(ValueError, match="has width site .*stock comfyui cannot run"):
        export(
            ExportConfig(model=teacher_file, run=run.folder, layout="comfyui", variant="ffn_text:1")
        )


def test_without_own_projections_a_group_goes_off_and_says_so(width_run, teacher_file):
    run = distil(width_run(), teacher_file, give_back=False, rounds=0)
    plan = run.load_plan()
    layout = layout_of(plan, plan.variant("4-5,text:2-3"))
    assert layout.notes == ("text:2-3 is off: no projection was trained for block 2",)


def test_a_rank_deficient_fit_warns_and_uses_the_ridge(
    width_run, teacher_file, make_run, calibration_of, capsys
):
    few = calibration_of(teacher_file, batches=2, samples=2)
    run = make_run(width_run("few").folder.parent / "tiny", teacher_file, few)
    run = Run(run)
    (run.folder / "depth").symlink_to(width_run("other").students)
    run.plan.write_text(width_run("third").plan.read_text())
    distil(run, teacher_file, rounds=0, sites="text:1")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert any(
        "text of block 1 (map) is rank-deficient: rank" in line and "the ridge decides" in line
        for line in lines
    )
    assert all(
        torch.isfinite(t).all()
        for t in saved_weights(run.projections / "1.text.safetensors").values()
    )


BAD = {
    "no such block": ("ffn_image:9", "ffn_image:9: there are blocks 0-5"),
    "not a site": ("heads:3", "'heads:3' is not a width site"),
    "no block before": ("text:0", "has no full block before it"),
    "inside an interval": ("ffn_image:3", "inside interval 2-3, whose student is block 2"),
    "cuts an interval": ("text:1-2", "cuts interval 2-3"),
}


@pytest.mark.parametrize("sites, message", BAD.values(), ids=BAD)
def test_bad_sites_are_one_line(width_run, teacher_file, sites, message):
    with pytest.raises(ValueError, match=message):
        distil(width_run(), teacher_file, sites=sites)


def test_no_sites_at_all(width_run, teacher_file):
    with pytest.raises(ValueError, match="no width sites; run detect-width first"):
        distil(width_run(), teacher_file, sites="")
