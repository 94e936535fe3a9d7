"""What a waiting node says and does, by the job's own files: in words, at failures, for runs before
it."""

import threading
import time

import comfy.model_management as memory
import folder_paths
import pytest

from ppcl_engine.jobs.state import LOG, METRICS, JobState, append_line, write_state
from ppcl_engine.system.atomic import write_json


@pytest.fixture
def run(pack, tmp_path, monkeypatch):
    """A run's folder in an output folder of its own, with a state."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))

    def make(name: str = "depth-00000000", **state):
        folder = pack("paths").runs().root / name
        folder.mkdir(parents=True)
        write_json(
            folder / "run.json",
            {"version": 1, "stages": [["probe", {"model": "m"}]], "identity": "x"},
        )
        write_state(folder, JobState(**{"status": "queued", **state}))
        return folder

    return make


@pytest.fixture
def said(pack):
    """What a node would have shown."""

    class Screen(pack("make.waiting").Screen):
        lines: list[str] = []

        def show(self, folder, state):
            self.say(pack("make.runs").progress_text(folder, state))

        def say(self, text):
            self.lines.append(text)

    screen = Screen(None)
    screen.lines = []
    return screen


TRAINING = {
    "status": "running",
    "stage": "distill-depth",
    "what": "distill-depth",
    "step": 120,
    "steps": 1400,
    "rate": 3.14,
}


@pytest.mark.parametrize(
    "state, text",
    [
        (
            {**TRAINING, "seconds_left": 407.6},
            "distill-depth 120 of 1,400, 3.1/s, 7 min left, loss 0.043",
        ),
        (
            {**TRAINING, "rate": 0.02, "seconds_left": 64_000},
            "distill-depth 120 of 1,400, 50 s each, 17 h 47 min left, loss 0.043",
        ),
        (
            {**TRAINING, "number": 2, "stages": 3, "rate": None},
            "distill-depth 120 of 1,400 (stage 2 of 3), loss 0.043",
        ),
        (
            {
                "status": "running",
                "stage": "probe",
                "step": 3,
                "steps": 24,
                "rate": 1.0,
                "seconds_left": 21.0,
            },
            "probe 3 of 24, 1.0/s, 21 s left",
        ),
        ({"status": "queued"}, "depth-00000000: queued"),
        ({"status": "done"}, "depth-00000000: done"),
        ({"status": "failed", "error": "no\nspace"}, "depth-00000000: failed (no space)"),
    ],
)
def test_how_far_it_is_in_a_line(pack, run, state, text):
    folder = run()
    append_line(folder / METRICS, "1.0,interval 3-4,118,0.05")
    append_line(folder / METRICS, "1.0,interval 3-4,119,0.0432")
    assert pack("make.runs").progress_text(folder, JobState(**state)) == text


def test_it_follows_to_the_end(pack, run, said):
    folder = run(status="running", stage="probe", step=1, steps=2)
    threading.Timer(
        0.5, lambda: write_state(folder, JobState(status="done", stage="probe"))
    ).start()
    assert pack("make.waiting").follow(folder, said).status == "done"
    assert said.lines[0] == "probe 1 of 2" and said.lines[-1] == "depth-00000000: done"


def test_a_failure_is_a_line_in_the_words_of_widgets(pack, run, said):
    folder = run(
        status="failed", stage="distill-depth", error="loss is nan at step 3; lower --learning-rate"
    )
    with pytest.raises(
        ValueError, match=r"^depth-00000000 failed: loss is nan at step 3; lower learning_rate$"
    ):
        pack("make.waiting").follow(folder, said)


def test_a_worker_that_could_not_begin_has_last_words(pack, run, said):
    folder = run(
        status="failed",
        error="the worker ended before its first stage; log.txt in the run folder says why",
    )
    (folder / LOG).write_text("Traceback\n  ...\nImportError: no module named torch\n")
    with pytest.raises(
        ValueError, match=r"says why \(its last words: ImportError: no module named torch\)$"
    ):
        pack("make.waiting").follow(folder, said)


def test_an_interrupt_ends_the_watching_alone(pack, run, said):
    folder = run(status="running", stage="probe", step=1, steps=2)
    memory.interrupt_current_processing()
    with pytest.raises(memory.InterruptProcessingException):
        pack("make.waiting").follow(folder, said)
    assert said.lines[-1] == "depth-00000000 goes on; Cancel Job (PPCL) stops it"
    assert not memory.processing_interrupted() and not (folder / "cancel").exists()


def test_an_interrupt_ends_a_job_that_another_process_started(pack, run, said):
    """Its worker is asked, by the file."""
    folder = run(status="running", stage="probe", step=7, steps=24)

    def worker():
        while not (folder / "cancel").exists():
            time.sleep(0.05)
        write_state(folder, JobState(status="cancelled", stage="probe", step=8, steps=24))

    threading.Thread(target=worker).start()
    memory.interrupt_current_processing()
    with pytest.raises(memory.InterruptProcessingException):
        pack("make.waiting").follow(folder, said, pack("make.waiting").Worker(folder, None))
    assert (
        said.lines[-1] == "stopped at 8 of 24 of probe, all of it saved; press Run again to go on"
    )


def test_the_hosts_models_leave(pack, load, teacher, velocity):
    model = load(teacher.name)
    velocity(model)
    assert memory.current_loaded_models
    pack("make.waiting").leave_memory()
    assert not memory.current_loaded_models


@pytest.mark.parametrize(
    "state, wait, message",
    [
        (
            {"status": "failed", "error": "no space"},
            True,
            "run probe-00000000, which this node needs, has failed: no space",
        ),
        (
            {"status": "cancelled", "error": "cancelled"},
            True,
            "run probe-00000000, which this node needs, was cancelled: cancelled",
        ),
        (
            {"status": "queued"},
            True,
            "was prepared but not started; start it, then press Run again",
        ),
        (
            {"status": "running"},
            False,
            "is still running; turn wait on, or come back when it is done",
        ),
    ],
)
def test_a_run_before_that_is_not_done(pack, run, said, state, wait, message):
    run("probe-00000000", **state)
    with pytest.raises(ValueError, match=message):
        pack("make.waiting").finish_upstream("probe-00000000", wait, said)


def test_it_waits_for_a_run_before(pack, run, said):
    folder = run("probe-00000000", status="running", stage="probe", step=1, steps=2)
    threading.Timer(
        0.5, lambda: write_state(folder, JobState(status="done", stage="probe"))
    ).start()
    pack("make.waiting").finish_upstream("probe-00000000", True, said)
    assert said.lines[-1] == "probe-00000000: done"


def test_a_recording_that_was_not_drawn_yet(pack, run, said):
    folder = pack("paths").runs().root / "record-00000000"
    run()
    write_json(folder / "recording.json", {"model": "m"})
    with pytest.raises(
        ValueError, match="nothing is recorded in record-00000000 yet; .* LATENT to after"
    ):
        pack("make.waiting").finish_upstream("record-00000000", True, said)
