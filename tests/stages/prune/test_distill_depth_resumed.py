"""Students of a training that was stopped, that does not fit in memory or that diverges: what is saved
and when, and the same bits in the end."""

import signal

import pytest
import torch

from ppcl_engine.algorithms.distillation import kept_trainers
from ppcl_engine.algorithms.distillation.kept_trainers import KeptTrainers
from ppcl_engine.algorithms.distillation.trainer import Diverged, Trainer, saved_weights
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import Interval
from ppcl_engine.stages.prune import distill_depth as stage
from ppcl_engine.system.interruption import Stopped
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.distilled_depth import ALL, losses, students
from ...tiny.trained_run import poison


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
def test_stopped_in_a_round_and_gone_on_is_the_same_bits(depth_run, distill, streamed, monkeypatch):
    # a shell's background jobs are started with it ignored
    before = signal.getsignal(signal.SIGINT)
    whole, halted = depth_run("whole"), depth_run("halted")
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


def test_students_stay_in_memory_and_are_copied_once(depth_run, distill, counted):
    run = depth_run()
    distill(run, rounds=3)
    # the resident teacher reads six blocks
    assert counted == {"read": 6 + 2, "initialised": 0, "restored": 0, "saved": 3 * 2}


def test_students_that_do_not_fit_are_the_same_bits(depth_run, distill, counted, monkeypatch):
    roomy, tight, narrow = depth_run("roomy"), depth_run("tight"), depth_run("narrow")
    distill(roomy, rounds=3)
    monkeypatch.setattr(kept_trainers, "free_memory", lambda: 0)
    distill(tight, rounds=3)
    assert counted["restored"] == 2 * 2
    one = sum(t.nbytes for t in saved_weights(roomy.student("0-1")).values()) * 3
    monkeypatch.setattr(kept_trainers, "free_memory", lambda: one / kept_trainers.SHARE + 1)
    distill(narrow, rounds=3, streamed=True)
    assert counted["restored"] == 2 * 2 + 2  # one of the two stays
    assert students(tight) == students(roomy) == students(narrow)


def test_large_students_are_saved_seldom_and_on_the_way_out(
    depth_run, distill, counted, monkeypatch
):
    """As many rounds lie between saves as keep all of them within what may be written, a tenth of
    the rounds at most."""
    monkeypatch.setattr(kept_trainers, "MOST_WRITTEN", 1)
    whole, halted = depth_run("whole"), depth_run("halted")
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


def test_what_is_finished_is_left_alone(depth_run, distill):
    run = depth_run()
    distill(run)
    before = [(p, p.stat().st_mtime_ns) for p in sorted(run.students.iterdir())]
    distill(run)
    assert before == [(p, p.stat().st_mtime_ns) for p in sorted(run.students.iterdir())]


def test_other_settings_are_refused_by_name(depth_run, distill):
    run = depth_run()
    distill(run, rounds=1, updates=2)
    before = students(run)
    with pytest.raises(
        ValueError,
        match=r"0-1.safetensors was trained with other settings \(loss 'mse' -> 'direction'\)",
    ):
        distill(run, rounds=1, updates=2, loss="direction")
    assert students(run) == before


def test_a_loss_that_is_not_a_number_stops_with_the_last_good_file(depth_run, distill, monkeypatch):
    """Step 4 is in round 1, when all intervals have been saved in round 0."""
    run = depth_run()
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
    depth_run, distill, monkeypatch
):
    run = depth_run()
    poison(monkeypatch, step=1)
    with pytest.raises(
        Diverged, match="at step 1 of interval 0-1; nothing was saved; lower --learning-rate"
    ):
        distill(run)
    assert not run.students.exists() or students(run) == {}
    assert issubclass(Diverged, ValueError)
