"""The worker: what ends it, what it says then, and that going on from there ends in the same
bits."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from ppcl_engine.data.calibration import CalibrationSet, save_calibration
from ppcl_engine.jobs import attempt
from ppcl_engine.jobs.failures import failure, memory_line
from ppcl_engine.jobs.launch import WORKER, launch, stop
from ppcl_engine.jobs.spec import JobSpec, write_spec
from ppcl_engine.jobs.state import (
    JobState,
    ask_to_cancel,
    current_state,
    read_events,
    read_state,
    write_state,
)
from ppcl_engine.settings.prune_settings import ProbeConfig

from ..tiny.processes import Launched, exit_code
from .conftest import fork, is_at, until

ALL = ("probe", "detect", "distill-depth", "variants", "polish", "export")
LONG = {"distill_depth": {"rounds": 100, "updates": 40}}
DONE, UNEXPECTED, REFUSED, CANCELLED = 0, 1, 2, 130


def bits(path: Path) -> dict[str, str]:
    """Hashes of everything that does not measure time."""
    files = [
        path / "curves.safetensors",
        *(f for d in ("probes", "depth", "polished") for f in (path / d).rglob("*.safetensors")),
    ]
    hashes = {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    plan = json.loads((path / "plan.json").read_text())
    return hashes | {"plan": json.dumps([plan["intervals"], plan["sites"]])}


@pytest.fixture
def at_work(prepare):
    """A worker in the midst of a training that would take minutes; killed at the end of the test at
    the latest."""
    children = []

    def make(*arguments, **changes) -> tuple[Path, int]:
        path = prepare("long", "probe", "detect", "distill-depth", **{**LONG, **changes})
        children.append(fork(path, *arguments))
        until(lambda: is_at(path, "distill-depth", 5))
        assert current_state(path).status == "running"
        return path, children[-1]

    yield make
    for child in children:
        if psutil.pid_exists(child) and psutil.Process(child).ppid() == os.getpid():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_job_is_done_and_tells_of_it(prepare):
    path = prepare("all", *ALL)
    assert exit_code(fork(path)) == DONE
    state = read_state(path)
    assert (state.status, state.stage, state.number, state.stages, state.error) == (
        "done",
        "export",
        6,
        6,
        "",
    )
    events = read_events(path)
    assert [e["stage"] for e in events if e["kind"] == "finished"] == list(ALL)
    kinds = [e["kind"] for e in events]
    assert kinds[0] == "started" and kinds[-1] == "done" and kinds.count("estimated") == len(ALL)
    assert all(e["memory"] > 0 and e["seconds"] >= 0 for e in events if e["kind"] == "estimated")
    rows = [line.split(",") for line in (path / "metrics.csv").read_text().splitlines()]
    assert {row[1] for row in rows} == {"interval 3-5", "polish"} and len(rows) == 18 + 6
    assert all(float(row[3]) > 0 for row in rows)
    assert (path / "exports" / "pruned.ppcl.safetensors").exists()
    assert not list(path.rglob("*.partial")) and not list((path / "states").glob("*"))


def test_a_run_that_ended_is_refused_and_nothing_is_written(prepare):
    path = prepare("probe", "probe")
    write_state(path, JobState(status="failed", error="no reason"))
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert (
        subprocess.run([sys.executable, str(WORKER), str(path)], capture_output=True).returncode
        == REFUSED
    )
    assert {
        p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "worker.lock"
    } == before


def test_a_second_worker_is_refused(at_work):
    path, child = at_work()
    assert exit_code(fork(path)) == REFUSED
    assert current_state(path).pid == child and current_state(path).status == "running"


def test_cancel_saves_and_ends_soon(at_work):
    path, child = at_work()
    ask_to_cancel(path)
    assert exit_code(child) == CANCELLED
    state = read_state(path)
    assert state.status == "cancelled" and state.error.startswith("cancelled; stopped at step")
    assert list((path / "depth").glob("*.safetensors"))
    assert exit_code(fork(path)) == REFUSED


def test_a_signal_cancels(at_work):
    path, child = at_work()
    os.kill(child, signal.SIGTERM)
    assert exit_code(child) == CANCELLED
    assert read_state(path).error.startswith("cancelled by a signal (SIGTERM); stopped at step")


def test_control_c_cancels(at_work):
    path, child = at_work()
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == CANCELLED
    assert read_state(path).error.startswith("cancelled by Ctrl-C; stopped at step")


@pytest.mark.parametrize("stage", ["probe", "detect", "variants", "polish"])
def test_every_stage_ends_soon(prepare, stage):
    slow = {
        "probe": {"train_steps": 5000},
        "detect": {"bootstrap": 3000},
        "polish": {"steps": 5000},
        "variants": {},
    }
    path = prepare("slow", "probe", "detect", "distill-depth", stage, **{stage: slow[stage]})
    child = fork(path)
    until(lambda: is_at(path, stage, 0))
    time.sleep(0.05)
    ask_to_cancel(path)
    assert exit_code(child) in (CANCELLED, DONE)  # variants is quick
    assert read_state(path).is_final


def test_kill_9_is_told_and_another_attempt_ends_in_the_same_bits(store, prepare, stages_of):
    expected = prepare("alone", *ALL)
    assert exit_code(fork(expected)) == DONE
    moments = random.Random(0)
    for number, stage in enumerate(("distill-depth", "polish")):
        path = prepare(f"kill{number}", *ALL)
        child = fork(path)
        until(lambda path=path, stage=stage: is_at(path, stage))
        time.sleep(moments.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        assert (
            current_state(path).status == "failed" and "without a word" in current_state(path).error
        )
        assert read_state(path).status == "running"
        if number == 0:  # the same folder, by hand
            resumed = path
            assert exit_code(fork(path)) == DONE
        else:
            assert exit_code(fork(path, "--again")) == DONE
            resumed = store.path(f"{path.name}-2")
            assert read_state(path).status == "failed"
            assert read_events(resumed)[0]["finished"] == sum(
                e["kind"] == "finished" for e in read_events(path)
            )
        assert read_state(resumed).status == "done" and bits(resumed) == bits(expected)


def test_again_after_done_has_nothing_to_do(prepare):
    path = prepare("probe", "probe")
    assert exit_code(fork(path)) == DONE
    before = sorted(path.parent.iterdir())
    assert exit_code(fork(path, "--again")) == REFUSED
    assert sorted(path.parent.iterdir()) == before


def test_a_users_mistake_is_one_line(prepare):
    path = prepare("detect", "detect")  # without probes
    assert exit_code(fork(path)) == REFUSED
    state = read_state(path)
    assert state.status == "failed" and "does not exist; run probe first" in state.error
    assert read_events(path)[-1]["error"] == state.error


def test_a_run_written_by_hand_elsewhere(tmp_path, teacher_file, make_run, stages_of):
    """No store, a name with a space, relative paths, the model where this machine has it."""
    folder = make_run(tmp_path / "My run", teacher_file)
    ((stage, settings),) = stages_of("probe")
    write_spec(folder, JobSpec(stages=((stage, {**settings, "model": "nowhere.safetensors"}),)))
    assert exit_code(fork(folder)) == REFUSED and "nowhere.safetensors" in read_state(folder).error
    (folder / "state.json").unlink()
    assert exit_code(fork(folder, "--model", teacher_file)) == DONE


def test_folders_that_are_none(tmp_path):
    (tmp_path / "rubbish").mkdir()
    for name in ("nothing", "rubbish"):
        assert exit_code(fork(tmp_path / name)) == REFUSED
    assert not list((tmp_path / "rubbish").iterdir())


def test_a_lack_of_memory_names_the_setting(prepare, calibration_of, teacher_file, padded_inputs):
    path = prepare("probe", "probe")
    origin = calibration_of(teacher_file).origin
    large = CalibrationSet(
        [padded_inputs(seed=i, samples=96, grid=(1, 40, 40)) for i in range(2)], origin
    )
    save_calibration(path / "calibration.safetensors", large)

    def limit() -> None:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000, resource.RLIM_INFINITY))

    assert exit_code(fork(path, before=limit)) == REFUSED
    state = read_state(path)
    assert state.error.startswith("probe ran out of memory on cpu: turn on streamed")
    assert state.error.endswith("then start it again, it goes on") and "\n" not in state.error


def test_memory_is_known_by_its_errors(tmp_path):
    config = ProbeConfig(model=tmp_path, run=tmp_path, streamed=True)
    for error in (
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUDA out of memory. Tried 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
    ):
        assert "calibrate again with fewer samples" in memory_line(error, "probe", config)
    assert memory_line(RuntimeError("shapes do not match"), "probe", config) is None


def test_a_full_disk_and_our_own_errors_are_lines(tmp_path):
    config = ProbeConfig(model=tmp_path, run=tmp_path)
    assert failure(OSError(28, "No space left", "/x"), "probe", config) == (
        "/x: the disk is full; free space and start it again, it goes on from what is saved",
        REFUSED,
    )
    assert failure(ValueError("a\nb"), "probe", config) == ("a b", REFUSED)
    assert failure(KeyError("x"), "probe", config) == ("KeyError: 'x'", UNEXPECTED)


def test_a_file_that_is_in_the_way_is_named(prepare):
    path = prepare("probe", "probe")
    (path / "probes").write_text("a file in the place of a folder")
    assert exit_code(fork(path)) == REFUSED
    assert read_state(path).status == "failed" and "probes" in read_state(path).error


def test_an_error_that_nobody_expected_is_told_and_goes_on(prepare):
    def broken() -> None:
        from ppcl_engine.stages.prune import probe

        del probe.sweep

    path = prepare("probe", "probe")
    assert exit_code(fork(path, before=broken)) == UNEXPECTED
    assert read_state(path).status == "failed"
    assert read_state(path).error == "NameError: name 'sweep' is not defined"


def workers_of(folder: Path) -> list[int]:
    return [
        p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])
    ]


@pytest.mark.parametrize("outlive", [False, True])
def test_when_the_parent_is_killed_the_worker_ends_unless_it_was_to_go_on(prepare, outlive):
    path = prepare("long", "probe", "detect", "distill-depth", **LONG)
    parent = os.fork()
    if not parent:
        launch(path, outlive)
        time.sleep(1000)
    until(lambda: is_at(path, "distill-depth", 5))
    assert read_state(path).pid != parent and current_state(path).status == "running"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    if outlive:
        step = read_state(path).step
        until(lambda: read_state(path).step > step + 20)
        assert current_state(path).status == "running"
        ask_to_cancel(path)
    until(lambda: read_state(path).is_final)
    assert ("the process that started it has ended" in read_state(path).error) is not outlive
    until(lambda: not workers_of(path))


def test_a_launched_worker_is_stopped(prepare):
    path = prepare("long", "probe", "detect", "distill-depth", **LONG)
    process = launch(path, False)
    assert read_state(path).status in ("queued", "running") and read_state(path).pid == process.pid
    with pytest.raises(ValueError, match="already|is at work"):
        launch(path, False)
    until(lambda: current_state(path).status == "running")
    assert stop(process) == CANCELLED  # also while Python is still reading torch
    assert not workers_of(path)
    assert (read_state(path).status, read_state(path).error) == ("cancelled", "cancelled")
    assert "worker: cancelled" in (path / "log.txt").read_text()


def test_of_two_processes_the_one_that_failed_says_why(tmp_path, prepare):
    path = prepare("two", "probe", "detect", "distill-depth", **LONG)

    def second_has_no_memory() -> int:
        from ppcl_engine.algorithms.distillation.trainer import Trainer

        if os.environ["RANK"] == "1":
            Trainer.update = lambda *arguments: torch.empty(1 << 60)
        return attempt.main([str(path)])

    assert Launched(tmp_path, 2, second_has_no_memory).codes() == [REFUSED, REFUSED]
    assert read_state(path).error.startswith(
        "distill-depth ran out of memory on cpu: turn on streamed"
    )
    assert [e["rank"] for e in read_events(path) if e["kind"] == "process_failed"] == [1]
