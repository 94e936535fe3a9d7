"""state.json and events.jsonl: the contract at the top of jobs/state.py."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl_engine.jobs.state import (
    CANCEL,
    EVENTS,
    FINAL,
    STATE,
    STATUSES,
    JobState,
    append_event,
    append_line,
    ask_to_cancel,
    cancel_asked,
    claimed,
    current_state,
    finished_stages,
    process_of,
    read_events,
    read_state,
    settle,
    write_state,
)

from .conftest import until


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(STATUSES), min_size=1, max_size=6))
def test_nothing_follows_a_final_state(tmp_path_factory, statuses):
    folder = tmp_path_factory.mktemp("run")
    for number, status in enumerate(statuses):
        ended = number > 0 and read_state(folder).is_final
        before = (folder / STATE).read_bytes() if ended else b""
        if ended:
            with pytest.raises(ValueError, match="that is final"):
                write_state(folder, JobState(status=status, step=number))
            assert (folder / STATE).read_bytes() == before
        else:
            assert write_state(folder, JobState(status=status, step=number)).step == number
            assert read_state(folder).status == status
    assert read_state(folder).is_final == bool(FINAL & set(statuses))


@pytest.mark.parametrize("status", sorted(FINAL))
def test_neither_a_cancel_nor_settling_leaves_a_final_state(tmp_path, status):
    write_state(tmp_path, JobState(status=status, pid=1, process_started=0.0))
    before = (tmp_path / STATE).read_bytes()
    ask_to_cancel(tmp_path)
    assert settle(tmp_path) == current_state(tmp_path) == read_state(tmp_path)
    assert (tmp_path / STATE).read_bytes() == before and not cancel_asked(tmp_path)


def test_there_and_back(tmp_path):
    state = JobState(
        status="running",
        stage="probe",
        number=1,
        stages=3,
        what="captions",
        step=4,
        steps=9,
        rate=1.5,
        seconds_left=3.25,
        last_good_step=2,
        pid=5,
        process_started=1.5,
        host="here",
        parent_pid=4,
        parent_started=1.0,
        error="é",
    )
    written = write_state(tmp_path, state)
    assert read_state(tmp_path) == written and replace(written, updated=0.0) == state
    assert written.updated == pytest.approx(time.time(), abs=5)


RUBBISH = {
    "empty": b"",
    "no JSON": b"{status: running",
    "no text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "a word": b'"done"',
    "null": b"null",
    "no status": b'{"stage": "probe"}',
    "another status": b'{"status": "exploded"}',
    "a status that is a number": b'{"status": 7}',
    "an unknown field": b'{"status": "done", "shell": "rm -rf"}',
    "a pid that is a word": b'{"status": "running", "pid": "1; reboot"}',
    "a pid that is true": b'{"status": "running", "pid": true}',
    "nesting without end": b"[" * 90_000,
    "a number without end": b'{"status": "running", "step": ' + b"9" * 50_000 + b"}",
    "a gigabyte, nearly": b" " * 200_000,
}


@pytest.mark.parametrize("content", RUBBISH.values(), ids=RUBBISH)
@pytest.mark.parametrize("reading", [read_state, current_state, settle, ask_to_cancel])
def test_rubbish_is_refused_in_one_line_and_left_alone(tmp_path, content, reading):
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        reading(tmp_path)
    assert str(tmp_path / STATE) in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(STATE, content)]


def test_a_missing_state_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="does not exist; prepare the run first"):
        read_state(tmp_path)


def test_a_reader_never_sees_half_a_state(tmp_path):
    write_state(tmp_path, JobState(status="running", error="x" * 3000))
    ended = threading.Event()

    def write():
        for step in range(150):
            write_state(tmp_path, JobState(status="running", step=step, error="x" * 3000))
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    reads = 0
    while not ended.is_set():
        assert read_state(tmp_path).error == "x" * 3000
        reads += 1
    thread.join()
    assert reads > 10 and not list(tmp_path.glob("*.partial"))


def running(pid: int, started: float, **more) -> JobState:
    return JobState(
        status="running",
        stage="polish",
        step=7,
        pid=pid,
        process_started=started,
        **{"host": platform.node(), **more},
    )


def test_a_process_that_is_there_is_at_work(tmp_path):
    write_state(tmp_path, running(*process_of(os.getpid())))
    assert current_state(tmp_path).status == "running"


@pytest.mark.parametrize("reaped", [True, False])
def test_a_process_that_is_gone_is_told_and_only_settling_writes_it(tmp_path, reaped):
    child = os.fork()
    if not child:
        time.sleep(100)
    write_state(tmp_path, running(*process_of(child)))
    os.kill(child, 9)
    if reaped:
        os.waitpid(child, 0)
    until(lambda: current_state(tmp_path).status == "failed")
    said = current_state(tmp_path)
    assert (
        said.error.startswith("the worker ended without a word")
        and "step 7 of polish" in said.error
    )
    assert read_state(tmp_path).status == "running"
    assert settle(tmp_path).status == read_state(tmp_path).status == "failed"
    assert read_events(tmp_path)[-1]["kind"] == "failed"
    if not reaped:
        os.waitpid(child, 0)


def test_the_pid_of_another_process_counts_as_gone(tmp_path):
    pid, started = process_of(os.getpid())
    write_state(tmp_path, running(pid, started - 3600))
    assert current_state(tmp_path).status == "failed"


def test_a_worker_elsewhere_is_believed_until_it_is_silent(tmp_path):
    state = write_state(tmp_path, running(1, 0.0, host="another machine"))
    assert current_state(tmp_path) == state
    values = json.loads((tmp_path / STATE).read_text())
    (tmp_path / STATE).write_text(json.dumps({**values, "updated": time.time() - 1000}))
    assert current_state(tmp_path).status == "failed"


def test_settling_waits_for_no_lock(tmp_path):
    write_state(tmp_path, running(os.getpid(), 0.0))
    with claimed(tmp_path), pytest.raises(ValueError, match="another process is at work"):
        settle(tmp_path)


def test_a_run_that_nobody_began_is_cancelled_at_once(tmp_path):
    write_state(tmp_path, JobState(status="queued"))
    ask_to_cancel(tmp_path)
    assert read_state(tmp_path).status == "cancelled"
    assert [event["kind"] for event in read_events(tmp_path)] == ["cancelled"]


def test_a_cancel_is_a_file(tmp_path):
    write_state(tmp_path, running(*process_of(os.getpid())))
    ask_to_cancel(tmp_path)
    assert cancel_asked(tmp_path) and (tmp_path / CANCEL).read_bytes() == b""
    assert read_state(tmp_path).status == "running"


def test_events_are_lines(tmp_path):
    assert read_events(tmp_path) == []
    append_event(tmp_path, "started", pid=3)
    append_event(tmp_path, "stage", stage="probe\n")
    assert [{k: v for k, v in event.items() if k != "time"} for event in read_events(tmp_path)] == [
        {"kind": "started", "pid": 3},
        {"kind": "stage", "stage": "probe\n"},
    ]


def test_half_a_line_is_not_read_and_cut_off(tmp_path):
    append_event(tmp_path, "started")
    with open(tmp_path / EVENTS, "ab") as file:
        file.write(b'{"time": 1, "ki')
    assert [event["kind"] for event in read_events(tmp_path)] == ["started"]
    append_event(tmp_path, "done")
    assert [event["kind"] for event in read_events(tmp_path)] == ["started", "done"]
    append_line(tmp_path / "new.csv", "a,b")
    assert (tmp_path / "new.csv").read_bytes() == b"a,b\n"


@pytest.mark.parametrize(
    "line", [b"nonsense", b"[]", b'{"time": 1}', b'{"kind": 4}', b"\xff\xff", b"[" * 5000]
)
def test_a_line_that_is_no_event_is_named(tmp_path, line):
    append_event(tmp_path, "started")
    with open(tmp_path / EVENTS, "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match=r"events\.jsonl, line 2: not an event"):
        read_events(tmp_path)


def test_stages_of_an_earlier_attempt_count():
    events = [
        {"kind": "continued", "finished": 2},
        {"kind": "stage"},
        {"kind": "finished"},
        {"kind": "stage"},
    ]
    assert finished_stages(events) == 3 and finished_stages([]) == 0
    assert finished_stages([{"kind": "continued", "finished": "all"}]) == 0


@pytest.mark.parametrize("name", [CANCEL, "worker.lock", EVENTS, STATE, "depth"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir(), outside.mkdir()
    write_state(folder, running(*process_of(os.getpid())))
    target = outside if name == "depth" else outside / "file"
    if name == STATE:
        (folder / STATE).rename(target)
    (folder / name).symlink_to(target)
    before = sorted(outside.rglob("*"))
    with pytest.raises(ValueError, match=f"{name} is a link"):
        ask_to_cancel(folder)
    with pytest.raises(ValueError, match=f"{name} is a link"), claimed(folder):
        pass
    assert sorted(outside.rglob("*")) == before
