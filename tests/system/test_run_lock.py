"""A run folder belongs to one process at a time, of the command line as of jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ppcl_engine.jobs.state import claimed
from ppcl_engine.system.run_lock import HOLDER, holding, locked

HOLD = """
import sys
from pathlib import Path
from ppcl_engine.system.run_lock import holding
with holding(Path(sys.argv[1]), "polish"):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder's lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def stage(tmp_path, teacher_file, line_of):
    """A stage that has nothing to work on; the line that it ends with."""

    def run() -> str:
        arguments = ["--model", teacher_file, "--run", tmp_path, "--device", "cpu"]
        return line_of("variants", *arguments)

    return run


def test_the_second_hears_who_holds_it_and_a_killed_one_holds_nothing(tmp_path, holder, stage):
    line = stage()
    assert line.startswith(f"ppcl: polish (process {holder.pid} on ") and ", since 20" in line
    assert line.endswith(f") is at work on {tmp_path}; wait for it, or stop it")
    with pytest.raises(ValueError, match=f"polish .process {holder.pid} "), claimed(tmp_path):
        pass
    holder.kill()
    holder.wait()
    assert "calibration.safetensors does not exist" in stage()
    assert not (tmp_path / HOLDER).exists()


def test_a_jobs_worker_keeps_the_command_line_out(tmp_path, stage):
    with locked(tmp_path, "a job's worker"):
        assert "does not exist" in stage()  # this very process has it: its own stages run
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match="another process is at work"),
        claimed(tmp_path),
    ):
        pass


def test_what_a_dead_holder_left_is_not_believed(tmp_path):
    about = {
        "pid": os.getpid(),
        "host": "elsewhere",
        "doing": "polish",
        "since": 0.0,
        "process_started": 1.0,
    }
    for content, named in (
        (json.dumps(about), "polish"),
        ("[", "another process"),
        ('{"pid": "1"}', "another process"),
    ):
        (tmp_path / HOLDER).write_text(content)
        with (
            locked(tmp_path),
            pytest.raises(ValueError, match=f"^{named}.* is at work"),
            locked(tmp_path),
        ):
            pass
    (tmp_path / HOLDER).unlink()
    with holding(tmp_path / "new", "probe"), holding(tmp_path / "new", "detect"):
        assert json.loads((tmp_path / "new" / HOLDER).read_text())["doing"] == "probe"


def test_the_demo_s_own_folder_is_held_too(tmp_path, holder, line_of, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert line_of("demo", "--quick").startswith(f"ppcl: polish (process {holder.pid} on ")


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "link to nothing"])
def test_what_has_the_lock_s_name_and_is_no_file(tmp_path, stage, kind):
    lock, kept = tmp_path / "worker.lock", tmp_path / "kept.txt"
    kept.write_text("kept")
    make = {
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
        "link": lambda: lock.symlink_to(kept),
        "link to nothing": lambda: lock.symlink_to(tmp_path / "none"),
    }
    make[kind]()
    assert stage() == f"ppcl: {lock} is not a file but a folder, link or pipe; remove it"
    assert kept.read_text() == "kept" and not (tmp_path / "none").exists()
