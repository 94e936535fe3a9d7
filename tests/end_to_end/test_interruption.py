"""kill -9 and Ctrl-C at any moment, then the same command: the same bits as a run that was left
alone."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from ppcl_engine.system.early import INTERRUPTED

from ..tiny.processes import exit_code, forked

KILLS = 10
RUN_FILE = """
[common]
model = "{model}"
run = "{run}"
device = "cpu"
streamed = true

[probe]
train_steps = 2

[detect]
remove = 3
longest = 3
bootstrap = 2

[distill-depth]
rounds = 4
updates = 4

[detect-width]
share = 0.4
longest = 2
samples = 6
form = "gated"

[distill-width]
rounds = 3
updates = 4

[polish]
steps = 6
save_every = 2

[finetune]
variant = "all"
name = "tuned"
steps = 4
save_every = 1
"""


def write_run_file(folder: Path, teacher: Path, make_run) -> Path:
    make_run(folder / "run", teacher)
    path = folder / "run.toml"
    path.write_text(RUN_FILE.format(model=teacher, run=folder / "run"))
    return path


def result(path: Path) -> dict[str, str]:
    run = path.parent / "run"
    folders = ("probes", "depth", "width", "polished", "tuned")
    files = [file for folder in folders for file in (run / folder).rglob("*.safetensors")]
    files += [run / "curves.safetensors", run / "plan.json"]
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory, teacher_file, make_run) -> tuple[dict[str, str], float]:
    """What an uninterrupted run leaves, and the seconds it took."""
    path = write_run_file(tmp_path_factory.mktemp("alone"), teacher_file, make_run)
    begun = time.monotonic()
    assert exit_code(forked("run", path)) == 0
    return result(path), time.monotonic() - begun


def killed_after(seconds: float, path: Path) -> bool:
    """False when it had ended by then."""
    child = forked("run", path)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return exit_code(child) == -signal.SIGKILL


def test_kill_at_ten_random_moments_changes_no_bit(tmp_path, teacher_file, make_run, left_alone):
    """Each run is killed again and again while it goes on, until it comes to its end: kills hit
    every stage, and what earlier kills left."""
    expected, seconds = left_alone
    moments, killed, runs = random.Random(0), 0, 0
    while killed < KILLS:
        path = write_run_file(tmp_path / str(runs), teacher_file, make_run)
        while killed < KILLS and killed_after(moments.uniform(0, seconds / 2), path):
            killed += 1
        assert exit_code(forked("run", path)) == 0
        assert result(path) == expected
        assert not list(path.parent.rglob("*.partial"))
        runs += 1


def test_control_c_saves_says_how_to_go_on_and_changes_no_bit(
    tmp_path, teacher_file, make_run, left_alone, capfd
):
    expected, _ = left_alone
    path = write_run_file(tmp_path, teacher_file, make_run)
    child = forked("run", path)
    students = tmp_path / "run" / "depth"
    while not list(students.glob("*.safetensors")):
        time.sleep(0.005)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == INTERRUPTED
    assert list(students.glob("*.safetensors"))
    assert exit_code(forked("run", path)) == 0
    assert result(path) == expected
