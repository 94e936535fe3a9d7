"""Students of intervals: they learn, start as they should, and do not know of each other."""

import json

import pytest
import torch

from ppcl_engine.algorithms.distillation import round_cache
from ppcl_engine.algorithms.distillation.losses import interval_loss
from ppcl_engine.algorithms.distillation.saved_training import settings_of
from ppcl_engine.algorithms.distillation.trainer import saved_weights
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.system.seeds import draw_seed
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.distilled_depth import ALL, losses, students


@pytest.mark.parametrize("loss", ["direction", "direction_log_norm", "mse"])
@pytest.mark.parametrize("correction", ["none", "affine"])
def test_the_loss_falls(depth_run, distill, teacher_file, calibration_of, loss, correction):
    """On pictures that were not seen before: the first pass of round 1 against the first of round
    0."""
    run = depth_run(calibration=calibration_of(teacher_file, samples=32))
    distill(
        run,
        loss=loss,
        correction=correction,
        rounds=2,
        updates=64,
        learning_rate=1e-3,
        intervals="2-4",
    )
    history = losses(run, "2-4")
    assert len(history) == 128
    assert sum(history[64:80]) < (0.7 if correction == "none" else 0.95) * sum(history[:16])


def test_the_affine_start_beats_a_plain_copy_before_any_training(depth_run, distill):
    first = {}
    for correction in ("affine", "8", "none"):
        run = depth_run(correction)
        distill(run, correction=correction, rounds=1, updates=4)
        first[correction] = [losses(run, interval)[0] for interval in ALL]
    for affine, low_rank, plain in zip(*first.values(), strict=True):
        assert affine < low_rank < plain and affine < 0.5 * plain


@pytest.mark.parametrize("init, origin", [("first", 2), ("middle", 3)])
def test_a_student_starts_as_the_first_or_middle_block(depth_run, distill, model, init, origin):
    run = depth_run()
    distill(
        run, init=init, correction="none", learning_rate=0.0, rounds=1, updates=2, intervals="2-4"
    )
    state = saved_weights(run.student("2-4"))
    expected = model.transformer_blocks[origin].state_dict()
    assert state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in state
    )


@pytest.mark.parametrize("loss", ["direction", "direction_log_norm", "mse"])
def test_the_first_loss_is_the_copys_own(depth_run, distill, architecture, model, loss):
    """Input: the teacher's own input of block 2; target: its output of block 4; fresh noise of
    (seed, 0)."""
    run = depth_run()
    distill(run, loss=loss, correction="none", rounds=1, updates=1, intervals="2-4", seed=3)
    state = architecture.embed(model, load_calibration(run.calibration).fresh(0, draw_seed(3, 0)))
    states = [state]
    for block in model.transformer_blocks:
        states.append(architecture.run_block(block, states[-1]))
    student = architecture.run_block(model.transformer_blocks[2], states[2])
    expected = interval_loss(loss, student, states[5], ("image", "text"))
    assert losses(run, "2-4")[0] == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) != pytest.approx(
        float(interval_loss(loss, student, states[5], ("image",))), rel=1e-3
    )


@pytest.mark.parametrize(
    "correction, shapes", [("none", []), ("affine", [(32, 32)]), ("3", [(3, 32), (32, 3)])]
)
def test_the_form_of_the_correction(depth_run, distill, correction, shapes):
    run = depth_run(intervals="0-1 3-5")
    distill(run, correction=correction, rounds=1, updates=1)
    # nothing reads the last text
    for interval, streams in (("0-1", {"image", "text"}), ("3-5", {"image"})):
        maps = {
            n: tuple(t.shape)
            for n, t in saved_weights(run.student(interval)).items()
            if n.startswith("correction.")
        }
        assert {name.split(".")[2] for name in maps} == (streams if shapes else set())
        assert [s for n, s in maps.items() if ".image." in n and len(s) == 2] == shapes
    assert [i.correction for i in run.load_plan().intervals] == [correction] * 2


@pytest.mark.parametrize("wrong", ["0", "-1", "full", ""])
def test_other_corrections_are_refused(depth_run, distill, wrong):
    with pytest.raises(ValueError, match="choose affine, none or a rank such as 16"):
        distill(depth_run(), correction=wrong)


@pytest.mark.parametrize("cache_gb", [8.0, 1.7e-5], ids=["roomy", "tight"])
def test_any_order_and_any_subset_give_the_same_students(depth_run, distill, cache_gb):
    together, apart = depth_run("together", "0-1 2-3 4-5"), depth_run("apart", "0-1 2-3 4-5")
    distill(together, cache_gb=cache_gb, updates=12)
    for subset in ("4-5", "2-3 0-1"):
        distill(apart, cache_gb=cache_gb, updates=12, intervals=subset)
    assert students(together) == students(apart) and len(students(apart)) == 3
    assert together.load_plan() == apart.load_plan()


def test_a_cache_that_changes_the_training_is_told_of_first(depth_run, distill, capfd, monkeypatch):
    """12 updates are meant to have 3 batches; with one, each is used 12 times. What helps hangs on
    what is free."""
    roomy, tight = depth_run("roomy"), depth_run("tight")
    distill(roomy, updates=12, rounds=1)
    assert "--cache-gb" not in capfd.readouterr().err
    distill(tight, updates=12, rounds=1, cache_gb=1.7e-5, streamed=True)
    said = [line for line in capfd.readouterr().err.splitlines() if "--cache-gb" in line]
    assert len(said) == 1 and said[0].startswith(
        "--cache-gb 1.7e-05 holds 1 of the 3 batches that a round is meant to have, so each serves 12 updates in it instead "
        "of 4; --cache-gb 0.1 holds all ("
    )
    assert said[0].endswith(f" GB are free at {tight.folder})")
    distill(tight, updates=12, rounds=1, cache_gb=1.7e-5, streamed=True)
    assert "--cache-gb" not in capfd.readouterr().err  # nothing is left to do
    monkeypatch.setattr(round_cache, "free_memory", lambda device: 15_000)
    distill(depth_run("small"), updates=12, rounds=1, cache_gb=1.7e-5)
    said = capfd.readouterr().err
    assert "instead of 4; free more, or use fewer --updates (0.0 GB are free of memory)" in said


def test_a_cache_of_0_takes_what_is_free_and_keeps_to_it(depth_run, distill, capfd, monkeypatch):
    """A training that goes on has the batches that it began with, however much is free by then."""
    chosen, given = depth_run("chosen"), depth_run("given")
    monkeypatch.setattr(round_cache, "free_memory", lambda device: 2.2e4)
    distill(chosen, updates=12, rounds=1)
    assert "--cache-gb 1.76e-05 holds 1 of the 3 batches" in capfd.readouterr().err
    monkeypatch.undo()
    distill(chosen, updates=12, rounds=1)
    distill(given, updates=12, rounds=1, cache_gb=1.76e-5)
    assert students(chosen) == students(given)
    assert cache_of(chosen) == cache_of(given) == 1.76e-5
    monkeypatch.setattr(round_cache, "USUAL", 1e-6)  # GB, less than a round takes
    large = depth_run("large")
    distill(large, updates=12, rounds=1)
    assert cache_of(large) == 0.1


def cache_of(run) -> float:
    return settings_of(TensorFile(run.student(ALL[0])))["cache_gb"]


def test_a_cache_that_holds_no_batch_is_refused(depth_run, distill):
    with pytest.raises(ValueError, match="--cache-gb 1e-06 is too small for one batch"):
        distill(depth_run(), cache_gb=1e-6)


def test_padding_never_counts(depth_run, distill, teacher_file, calibration_of):
    plain, noisy = calibration_of(teacher_file), calibration_of(teacher_file)
    for batch in noisy.batches:
        batch["encoder_hidden_states"][~batch["encoder_hidden_states_mask"]] *= -50
    runs = [depth_run(name, calibration=c) for name, c in (("plain", plain), ("noisy", noisy))]
    for run in runs:
        distill(run, rounds=1)
    for interval in ALL:
        a, b = (saved_weights(run.student(interval)) for run in runs)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_plan_keeps_its_other_intervals_and_loses_its_sizes(depth_run, distill):
    run = depth_run()
    values = json.loads(run.plan.read_text())
    values["variants"] = [{"name": "small", "intervals": list(ALL)}]
    run.plan.write_text(json.dumps(values))
    distill(run, intervals="2-4", rounds=1, updates=1)
    plan = run.load_plan()
    assert [(i.name, i.correction) for i in plan.intervals] == [("0-1", "none"), ("2-4", "affine")]
    assert plan.variants == ()  # measured on students that are no longer there
    with pytest.raises(ValueError, match="interval '1-3' is not in the plan; it has: 0-1, 2-4"):
        distill(run, intervals="1-3")
