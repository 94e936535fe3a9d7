"""Students: they learn, they do not know of each other, and stopping changes no bit."""

import json
import signal

import pytest
import torch

from ppcl_engine.algorithms.distillation import kept_trainers, rounds
from ppcl_engine.algorithms.distillation.kept_trainers import KeptTrainers
from ppcl_engine.algorithms.distillation.losses import interval_loss
from ppcl_engine.algorithms.distillation.trainer import (
    Diverged,
    Trainer,
    cosine_schedule,
    saved_weights,
)
from ppcl_engine.data.calibration import CalibrationSet, load_calibration
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import Interval, PruningPlan, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.stages.prune import distill_depth as stage
from ppcl_engine.system.interruption import Stopped
from ppcl_engine.system.seeds import draw_seed
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.trained_run import poison

ALL = ("0-1", "2-4")


@pytest.fixture
def new_run(tmp_path, architecture, teacher_file, make_run):
    """Run folders with a calibration and a plan, no detection needed."""

    def make(
        name: str = "run", intervals: str = " ".join(ALL), calibration: CalibrationSet | None = None
    ):
        run, weights = (
            Run(make_run(tmp_path / name, teacher_file, calibration)),
            Weights(teacher_file),
        )
        plan = PruningPlan(
            architecture=architecture.name,
            config=weights.config,
            num_blocks=6,
            fingerprint=weights.fingerprint,
            intervals=parse_intervals(intervals),
        )
        run.plan.write_text(plan.to_json())
        return run

    return make


@pytest.fixture
def distill(teacher_file, run_stages):
    return lambda run, **settings: run_stages(teacher_file, run.folder, "distill_depth", **settings)


def losses(run: Run, interval: str) -> list[float]:
    return TensorFile(run.student(interval)).read("losses").tolist()


def students(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.students.iterdir())}


@pytest.mark.parametrize("loss", ["direction", "direction_log_norm", "mse"])
@pytest.mark.parametrize("correction", ["none", "affine"])
def test_the_loss_falls(new_run, distill, teacher_file, calibration_of, loss, correction):
    """On pictures that were not seen before: the first pass of round 1 against the first of round
    0."""
    run = new_run(calibration=calibration_of(teacher_file, samples=32))
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


def test_the_affine_start_beats_a_plain_copy_before_any_training(new_run, distill):
    first = {}
    for correction in ("affine", "8", "none"):
        run = new_run(correction)
        distill(run, correction=correction, rounds=1, updates=4)
        first[correction] = [losses(run, interval)[0] for interval in ALL]
    for affine, low_rank, plain in zip(*first.values(), strict=True):
        assert affine < low_rank < plain and affine < 0.5 * plain


@pytest.mark.parametrize("init, origin", [("first", 2), ("middle", 3)])
def test_a_student_starts_as_the_first_or_middle_block(new_run, distill, model, init, origin):
    run = new_run()
    distill(
        run, init=init, correction="none", learning_rate=0.0, rounds=1, updates=2, intervals="2-4"
    )
    state = saved_weights(run.student("2-4"))
    expected = model.transformer_blocks[origin].state_dict()
    assert state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in state
    )


@pytest.mark.parametrize("loss", ["direction", "direction_log_norm", "mse"])
def test_the_first_loss_is_the_copys_own(new_run, distill, architecture, model, loss):
    """Input: the teacher's own input of block 2; target: its output of block 4; fresh noise of
    (seed, 0)."""
    run = new_run()
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
def test_the_form_of_the_correction(new_run, distill, correction, shapes):
    run = new_run(intervals="0-1 3-5")
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
def test_other_corrections_are_refused(new_run, distill, wrong):
    with pytest.raises(ValueError, match="choose affine, none or a rank such as 16"):
        distill(new_run(), correction=wrong)


@pytest.mark.parametrize("cache_gb", [8.0, 7e-5], ids=["roomy", "tight"])
def test_any_order_and_any_subset_give_the_same_students(new_run, distill, cache_gb):
    together, apart = new_run("together", "0-1 2-3 4-5"), new_run("apart", "0-1 2-3 4-5")
    distill(together, cache_gb=cache_gb, updates=12)
    for subset in ("4-5", "2-3 0-1"):
        distill(apart, cache_gb=cache_gb, updates=12, intervals=subset)
    assert students(together) == students(apart) and len(students(apart)) == 3
    assert together.load_plan() == apart.load_plan()


def test_a_cache_that_changes_the_training_is_told_of_first(new_run, distill, capfd, monkeypatch):
    """12 updates are meant to have 3 batches; with one, each is used 12 times. What helps hangs on
    what is free."""
    roomy, tight = new_run("roomy"), new_run("tight")
    distill(roomy, updates=12, rounds=1)
    assert "--cache-gb" not in capfd.readouterr().err
    distill(tight, updates=12, rounds=1, cache_gb=7e-5, streamed=True)
    said = [line for line in capfd.readouterr().err.splitlines() if "--cache-gb" in line]
    assert len(said) == 1 and said[0].startswith(
        "--cache-gb 7e-05 holds 1 of the 3 batches that a round is meant to have, so each serves 12 updates in it instead "
        "of 4; --cache-gb 0.1 holds all ("
    )
    assert said[0].endswith(f" GB are free at {tight.folder})")
    distill(tight, updates=12, rounds=1, cache_gb=7e-5, streamed=True)
    assert "--cache-gb" not in capfd.readouterr().err  # nothing is left to do
    monkeypatch.setattr(rounds, "free_memory", lambda: 60_000)
    distill(new_run("small"), updates=12, rounds=1, cache_gb=7e-5)
    said = capfd.readouterr().err
    assert "instead of 4; free more, or use fewer --updates (0.0 GB are free of memory)" in said


def test_a_cache_that_holds_no_batch_is_refused(new_run, distill):
    with pytest.raises(ValueError, match="--cache-gb 1e-06 is too small for one batch"):
        distill(new_run(), cache_gb=1e-6)


def interrupt_after(interval: str, monkeypatch) -> None:
    """One Ctrl-C as soon as this interval has had its updates: the next one is in its own by
    then."""
    put = KeptTrainers.put

    def put_and_interrupt(self, part: Interval, trainer: Trainer) -> None:
        put(self, part, trainer)
        if part.name == interval:
            monkeypatch.setattr(KeptTrainers, "put", put)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(KeptTrainers, "put", put_and_interrupt)


@pytest.mark.parametrize("streamed", [False, True])
def test_stopped_in_a_round_and_gone_on_is_the_same_bits(new_run, distill, streamed, monkeypatch):
    # a shell's background jobs are started with it ignored
    before = signal.getsignal(signal.SIGINT)
    whole, halted = new_run("whole"), new_run("halted")
    distill(whole, updates=40, streamed=streamed)
    interrupt_after("0-1", monkeypatch)
    with pytest.raises(
        Stopped, match=r"stopped at step \d+ of interval 2-4; saved. Run the same command to go on"
    ):
        distill(halted, updates=40, streamed=streamed)
    assert 0 < len(losses(halted, "2-4")) < 40 and len(losses(halted, "0-1")) == 40
    assert signal.getsignal(signal.SIGINT) == before
    distill(halted, updates=40, streamed=streamed)
    assert students(halted) == students(whole)
    assert not any(halted.states.rglob("*.safetensors"))


@pytest.fixture
def counted(monkeypatch):
    """How often a block of the teacher is read, a student is built with numbers in it, and a
    training restored and saved."""
    done = {"read": 0, "initialised": 0, "restored": 0, "saved": 0}

    def count(owner, method: str, name: str) -> None:
        original = getattr(owner, method)

        def counting(*arguments, **named):
            done[name] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(owner, method, counting)

    count(Weights, "block", "read")
    count(Trainer, "restore", "restored")
    count(Trainer, "save", "saved")
    build = stage.build_student

    def building(*arguments):
        done["initialised"] += torch.empty(0).device.type != "meta"
        return build(*arguments)

    monkeypatch.setattr(stage, "build_student", building)
    return done


def test_students_stay_in_memory_and_are_copied_once(new_run, distill, counted):
    run = new_run()
    distill(run, rounds=3)
    # the resident teacher reads six blocks
    assert counted == {"read": 6 + 2, "initialised": 0, "restored": 0, "saved": 3 * 2}


def test_students_that_do_not_fit_are_the_same_bits(new_run, distill, counted, monkeypatch):
    roomy, tight, narrow = new_run("roomy"), new_run("tight"), new_run("narrow")
    distill(roomy, rounds=3)
    monkeypatch.setattr(kept_trainers, "free_memory", lambda: 0)
    distill(tight, rounds=3)
    assert counted["restored"] == 2 * 2
    one = sum(t.nbytes for t in saved_weights(roomy.student("0-1")).values()) * 3
    monkeypatch.setattr(kept_trainers, "free_memory", lambda: 2 * one + 1)
    distill(narrow, rounds=3, streamed=True)
    assert counted["restored"] == 2 * 2 + 2  # one of the two stays
    assert students(tight) == students(roomy) == students(narrow)


def test_large_students_are_saved_seldom_and_on_the_way_out(new_run, distill, counted, monkeypatch):
    """As many rounds lie between saves as keep all of them within what may be written, a tenth of
    the rounds at most."""
    monkeypatch.setattr(kept_trainers, "MOST_WRITTEN", 1)
    whole, halted = new_run("whole"), new_run("halted")
    distill(whole, rounds=30, updates=1)
    assert counted["saved"] == 2 * 10
    updates = []

    def stop(self, *arguments):
        update(self, *arguments)
        updates.append(1)
        if len(updates) == 9:  # the first student's update of round 4
            signal.raise_signal(signal.SIGINT)

    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", stop)
    with pytest.raises(Stopped):
        distill(halted, rounds=30, updates=1)
    assert [int(TensorFile(halted.student(name)).metadata["step"]) for name in ALL] == [5, 4]
    distill(halted, rounds=30, updates=1)
    assert students(halted) == students(whole)


def test_what_is_finished_is_left_alone(new_run, distill):
    run = new_run()
    distill(run)
    before = [(p, p.stat().st_mtime_ns) for p in sorted(run.students.iterdir())]
    distill(run)
    assert before == [(p, p.stat().st_mtime_ns) for p in sorted(run.students.iterdir())]


def test_other_settings_are_refused_by_name(new_run, distill):
    run = new_run()
    distill(run, rounds=1, updates=2)
    before = students(run)
    with pytest.raises(
        ValueError,
        match=r"0-1.safetensors was trained with other settings \(loss 'mse' -> 'direction'\)",
    ):
        distill(run, rounds=1, updates=2, loss="direction")
    assert students(run) == before


def test_a_loss_that_is_not_a_number_stops_with_the_last_good_file(new_run, distill, monkeypatch):
    """Step 4 is in round 1, when all intervals have been saved in round 0."""
    run = new_run()
    poison(monkeypatch, step=4)
    with pytest.raises(
        Diverged,
        match=r"loss is nan at step 4 of interval 0-1; the last good state \(step 4\) is kept",
    ):
        distill(run, updates=4, rounds=2)
    for interval in ALL:
        file = TensorFile(run.student(interval))
        assert file.metadata["step"] == "4" and all(
            t.isfinite().all() for t in file.read_all().values()
        )


def test_a_loss_that_is_not_a_number_before_the_first_save_leaves_no_file(
    new_run, distill, monkeypatch
):
    run = new_run()
    poison(monkeypatch, step=1)
    with pytest.raises(
        Diverged, match="at step 1 of interval 0-1; nothing was saved; lower --learning-rate"
    ):
        distill(run)
    assert not run.students.exists() or students(run) == {}
    assert issubclass(Diverged, ValueError)


def test_an_infinite_gradient_does_not_reach_the_weights():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    trainer = Trainer(module, weight_decay=0.0)
    with pytest.raises(Diverged, match="gradient is (inf|nan) at step 0 of here"):
        trainer.update(module.weight.abs().sqrt().sum() + module.weight.sqrt().sum(), 0.1, "here")
    assert module.weight.item() == 0 and trainer.losses == []


def test_the_learning_rate_warms_up_and_falls_to_a_thirtieth():
    rates = [cosine_schedule(step, 100, 0.3, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.03) and rates[9] == pytest.approx(0.3) == max(rates)
    assert rates[55] == pytest.approx(0.3 * (1 / 30 + 29 / 60), rel=1e-6)
    assert cosine_schedule(100, 100, 0.3, 10) == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_padding_never_counts(new_run, distill, teacher_file, calibration_of):
    plain, noisy = calibration_of(teacher_file), calibration_of(teacher_file)
    for batch in noisy.batches:
        batch["encoder_hidden_states"][~batch["encoder_hidden_states_mask"]] *= -50
    runs = [new_run(name, calibration=c) for name, c in (("plain", plain), ("noisy", noisy))]
    for run in runs:
        distill(run, rounds=1)
    for interval in ALL:
        a, b = (saved_weights(run.student(interval)) for run in runs)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_plan_keeps_its_other_intervals_and_loses_its_sizes(new_run, distill):
    run = new_run()
    values = json.loads(run.plan.read_text())
    values["variants"] = [{"name": "small", "intervals": list(ALL)}]
    run.plan.write_text(json.dumps(values))
    distill(run, intervals="2-4", rounds=1, updates=1)
    plan = run.load_plan()
    assert [(i.name, i.correction) for i in plan.intervals] == [("0-1", "none"), ("2-4", "affine")]
    assert plan.variants == ()  # measured on students that are no longer there
    with pytest.raises(ValueError, match="interval '1-3' is not in the plan; it has: 0-1, 2-4"):
        distill(run, intervals="1-3")
