"""Runs are found again by what they hang on, begin with what is there, and never change one
another."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from ppcl_engine.jobs.launch import launch, prepared_command
from ppcl_engine.jobs.spec import JobSpec, read_spec, write_spec
from ppcl_engine.jobs.state import (
    JobState,
    append_event,
    ask_to_cancel,
    process_of,
    read_events,
    read_state,
    write_state,
)
from ppcl_engine.jobs.store import RunStore
from ppcl_engine.system.tensor_files import TensorFile

from .conftest import files_of, finish, recording

NOT_NAMES = [
    "",
    ".",
    "..",
    "../secret",
    "a/b",
    "a\\b",
    "/etc",
    "A",
    "a b",
    "a.b",
    "é",
    "a\n",
    "\0",
    "٣",
    "-" * 200,
]


@pytest.mark.parametrize("name", NOT_NAMES)
def test_what_is_no_name_of_ours_is_no_path(store, stages_of, name):
    for use in (
        store.path,
        store.again,
        lambda n: store.prepare("probe", stages_of("probe"), n or "."),
    ):
        with pytest.raises(ValueError, match="is not the name of a run") as caught:
            use(name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert len(store.names()) == 1


@pytest.mark.parametrize("name", ["A", "a b", "é", "run;reboot", "$(reboot)", "a" * 101])
def test_nothing_is_launched_in_a_folder_of_another_name(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="is not the name of a run"):
        launch(tmp_path / name, False)
    assert not list((tmp_path / name).iterdir())


def test_a_link_or_a_file_is_no_run(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (store.root / "linked").symlink_to(tmp_path / "elsewhere")
    (store.root / "file").write_text("")
    for name in ("linked", "file", "nothing"):
        with pytest.raises(ValueError, match=f"run {name} is not in"):
            store.path(name)
    assert "linked" not in dict(store.names())


@pytest.mark.parametrize("kind", ["", "Probe", "../x", "1a", "a_b", "a" * 50])
def test_a_kind_becomes_a_name_or_is_refused(store, prepare, kind):
    with pytest.raises(ValueError, match="is not a kind of run"):
        prepare(kind, "probe")


def test_a_run_begins_with_its_upstreams_files_and_its_spec(store, prepare):
    path = prepare("probe", "probe")
    assert sorted(p.name for p in path.iterdir()) == [
        "calibration.safetensors",
        "run.json",
        "state.json",
    ]
    assert path.name.startswith("probe-") and store.path(path.name) == path
    assert read_state(path).status == "queued" and read_state(path).stages == 1
    assert (path / "calibration.safetensors").stat().st_nlink == 2
    spec = read_spec(path)
    assert spec.upstream == recording(store) and spec.identity.startswith(
        path.name.rpartition("-")[2]
    )


def test_the_same_request_is_the_same_run(store, stages_of, prepare):
    path = prepare("probe", "probe")
    again = store.prepare("probe", stages_of("probe"), recording(store))
    assert (again.path, again.is_new) == (path, True)  # still nobody has started it
    write_state(
        path,
        JobState(status="running", pid=os.getpid(), process_started=process_of(os.getpid())[1]),
    )
    assert not store.prepare("probe", stages_of("probe"), recording(store)).is_new
    finish(path)
    assert store.prepare("probe", stages_of("probe"), recording(store)) == type(again)(path, False)


def test_what_no_result_hangs_on_makes_no_new_run(store, prepare):
    path = prepare("polish", "polish")
    assert (
        prepare(
            "polish", "polish", polish={"streamed": True, "checkpointing": True, "save_every": 5}
        )
        == path
    )
    assert prepare("polish", "polish", polish={"seed": 5}) != path
    assert prepare("polish", "polish", polish={"device": "cuda"}) != path
    assert prepare("other", "polish") != path


def test_a_changed_model_or_picture_makes_a_new_run(store, stages_of, tmp_path, teacher_file):
    model, images = tmp_path / "m.safetensors", tmp_path / "images"
    shutil.copyfile(teacher_file, model)
    images.mkdir()
    (images / "a.png").write_bytes(b"1")
    request = [("calibrate", {"model": model, "images": images})]
    first = store.prepare("calibrate", request).path
    (images / "b.png").write_bytes(b"1")
    second = store.prepare("calibrate", request).path
    os.utime(model, (1, 1))
    assert len({first, second, store.prepare("calibrate", request).path}) == 3
    third = store.prepare("calibrate", request).path
    (tmp_path / "there").mkdir()
    moved = shutil.move(images, tmp_path / "there" / "images")
    assert (
        store.prepare("calibrate", [("calibrate", {"model": model, "images": moved})]).path == third
    )


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_another_attempt_goes_on_from_the_files(store, prepare, status):
    first = prepare("probe", "probe", "detect")
    (first / "probes").mkdir()
    (first / "probes" / "block_000.safetensors").write_bytes(b"half the work")
    (first / "states" / "calibrate").mkdir(parents=True)
    (first / "states" / "calibrate" / "batch_0.safetensors").write_bytes(b"drawn")
    (first / "states" / "detect").mkdir()
    (first / "states" / "detect" / "state_0.safetensors").write_bytes(b"gigabytes")
    (first / "metrics.csv").write_text("1,interval 1-2,0,0.5\n")
    (first / "log.txt").write_text("its own")
    append_event(first, "finished", number=1, stage="probe")
    finish(first, status)
    before = files_of(first)
    second = prepare("probe", "probe", "detect")
    assert second.name == f"{first.name}-2" and read_state(second).status == "queued"
    assert (second / "probes" / "block_000.safetensors").read_bytes() == b"half the work"
    assert (second / "states" / "calibrate" / "batch_0.safetensors").exists()
    assert not (second / "states" / "detect").exists() and not (second / "log.txt").exists()
    (event,) = read_events(second)
    assert (event["kind"], event["run"], event["finished"]) == ("continued", first.name, 1)
    with open(second / "metrics.csv", "a") as file:
        file.write("2,interval 1-2,1,0.4\n")
    left = {name: content for name, content in before.items() if not name.startswith("states")}
    assert files_of(first) == left  # gigabytes of scratch went
    finish(second, status)
    assert prepare("probe", "probe", "detect").name == f"{first.name}-3"


def test_a_worker_that_is_gone_is_written_down_before_another_attempt(store, prepare):
    first = prepare("probe", "probe")
    write_state(
        first,
        JobState(
            status="running",
            stage="probe",
            pid=os.getpid(),
            process_started=1.0,
            host=os.uname().nodename,
        ),
    )
    second = prepare("probe", "probe")
    assert second != first and read_state(first).status == "failed"
    assert "without a word" in read_state(first).error


def test_the_worker_s_again_finds_the_spec_by_itself(store, prepare):
    first = prepare("probe", "probe")
    finish(first, "failed")
    second = store.again(first.name).path
    assert read_spec(second) == read_spec(first) and second.name == f"{first.name}-2"
    assert store.again(second.name).path == second
    finish(second)
    assert store.again(first.name) == store.again(second.name)
    by_hand = store.root / "my-run"
    by_hand.mkdir()
    write_spec(by_hand, JobSpec(stages=read_spec(first).stages))
    write_state(by_hand, JobState(status="failed"))
    assert store.again("my-run").path.name == "my-run-2"


def test_an_upstream_must_be_done(store, prepare, stages_of):
    path = prepare("probe", "probe")
    with pytest.raises(
        ValueError, match="is queued; a new run can only start from one that is done"
    ):
        store.prepare("detect", stages_of("detect"), path.name)
    assert not [name for name, _ in store.names() if name.startswith("detect")]


def test_nothing_is_made_for_a_spec_that_is_refused(store, stages_of):
    before = files_of(store.root)
    for stages in ([("probe", {"model": "/m", "x": 1})], [("shell", {})]):
        with pytest.raises(ValueError):
            store.prepare("probe", stages, recording(store))
    assert files_of(store.root) == before and not list(store.root.glob(".new-*"))


def test_two_callers_get_one_run(store, stages_of):
    found, together = [], threading.Barrier(6)

    def call():
        together.wait()
        found.append(store.prepare("probe", stages_of("probe"), recording(store)).path)

    threads = [threading.Thread(target=call) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 6 and len(set(found)) == 1
    assert not list(store.root.glob(".new-*"))
    assert len([name for name, _ in store.names() if name.startswith("probe")]) == 1


@pytest.mark.parametrize("rubbish", ["folder", "file", "link", "another request"])
def test_a_name_that_is_taken_is_passed_over(store, prepare, tmp_path, rubbish):
    taken = prepare("probe", "probe")
    spec = read_spec(taken)
    shutil.rmtree(taken)
    if rubbish == "file":
        taken.write_text("")
    elif rubbish == "link":
        taken.symlink_to(tmp_path)
    else:
        taken.mkdir()
    if rubbish == "another request":
        write_spec(taken, replace(spec, identity="f" * 64))
    assert prepare("probe", "probe").name == f"{taken.name}-2"


def test_what_a_killed_caller_left_goes(store, prepare):
    left = store.root / ".new-abc"
    left.mkdir()
    prepare("probe", "probe")
    assert left.exists()  # another caller may be at it
    os.utime(left, (1, 1))
    prepare("detect", "detect")
    assert not left.exists()


def test_names_are_newest_first_and_rubbish_is_shown_as_such(store, prepare):
    first = prepare("probe", "probe")
    time.sleep(0.01)
    second = prepare("detect", "detect")
    assert [name for name, _ in store.names()][:2] == [second.name, first.name]
    (first / "state.json").write_text("{")
    states = dict(store.names())
    assert states[first.name].status == "failed" and "not a JSON file" in states[first.name].error
    (second / "run.json").write_text("{")
    assert (
        store.exports_of(second) == [] and prepare("probe", "probe", probe={"ridge": 0.5}).exists()
    )


def test_a_store_that_is_not_there_yet_is_empty(tmp_path):
    store = RunStore(tmp_path / "nothing")
    assert store.names() == [] and not store.root.exists()


def test_a_run_is_launched_once(store, prepare):
    path = prepare("probe", "probe")
    write_state(
        path,
        JobState(
            status="queued",
            pid=os.getpid(),
            process_started=process_of(os.getpid())[1],
            host=os.uname().nodename,
        ),
    )
    assert store.start(path) is None
    with pytest.raises(ValueError, match="is queued already"):
        launch(path, False)
    other = prepare("detect", "detect")
    ask_to_cancel(other)
    with pytest.raises(ValueError, match="was cancelled already"):
        store.start(other)


def test_the_command_for_a_terminal_can_be_typed(store, prepare):
    path = prepare("probe", "probe")
    done = subprocess.run(
        f"{prepared_command(path)} --help", shell=True, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0 and "--again" in done.stdout and done.stderr == ""
    assert "--num_processes 4" in prepared_command(path, processes=4)


def test_a_recording_is_known_by_its_content(store, tmp_path, stages_of):
    recorded = store.path(recording(store))
    (recorded / "run.json").unlink()
    path = store.prepare("probe", stages_of("probe"), recorded.name).path
    assert TensorFile(path / "calibration.safetensors").metadata
    (recorded / "calibration.safetensors").unlink()
    with pytest.raises(ValueError, match="neither a run.json nor a recording"):
        store.prepare("probe", stages_of("probe"), recorded.name)
