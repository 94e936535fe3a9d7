"""A store with a recording of the tiny teacher, job specs on it, and workers in a process of their
own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ppcl_engine.data.calibration import save_calibration
from ppcl_engine.estimate.needs import needs
from ppcl_engine.jobs import attempt
from ppcl_engine.jobs.spec import JobSpec, configs
from ppcl_engine.jobs.state import JobState, current_state, end
from ppcl_engine.jobs.store import RunStore

LONGEST = 60.0  # seconds that anything here may take
QUICK = {
    "probe": {"train_steps": 0},
    "detect": {"remove": 2, "longest": 3, "bootstrap": 4, "tokens": 3},
    "distill-depth": {"rounds": 3, "updates": 6, "warm_up": 2, "learning_rate": 1e-3},
    "variants": {"samples": 12},
    "polish": {"steps": 6, "save_every": 2},
    "export": {},
}


def until(true: Callable[[], object]) -> float:
    """Seconds until it is."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < LONGEST
        time.sleep(0.005)
    return time.monotonic() - begun


def fork(*arguments: object, before: Callable[[], None] = lambda: None) -> int:
    """The worker's main in a child (importing torch again would take the whole test). Returns its
    pid."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        before()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            sys.stderr = sys.stdout = nowhere  # pytest's own write to the parent's files
            code = attempt.main([str(argument) for argument in arguments])
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_at(path: Path, stage: str, step: int = 1) -> bool:
    state = current_state(path)
    return state.is_final or (state.stage == stage and state.step >= step)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def finish(path: Path, status: str = "done") -> None:
    end(path, JobState(status=status, error="" if status == "done" else "no reason"))


def recording(store: RunStore) -> str:
    return next(name for name, _ in store.names() if name.startswith("record"))


@pytest.fixture(scope="session")
def record(calibration_of):
    """A store with a recording of a teacher; returns the recording's name."""

    def make(store: RunStore, teacher: Path) -> str:
        def write(folder: Path) -> None:
            save_calibration(folder / "calibration.safetensors", calibration_of(teacher))

        return store.derive("record", "", write, {"teacher": str(teacher)}).name

    return make


@pytest.fixture
def store(tmp_path, teacher_file, record) -> RunStore:
    store = RunStore(tmp_path / "ppcl")
    record(store, teacher_file)
    return store


@pytest.fixture(scope="session")
def stages_of(teacher_file):
    """(stage, settings) pairs at tiny sizes; `changes`: by stage, with '_' for '-'."""

    def make(*names: str, **changes: dict) -> list[tuple[str, dict]]:
        common = {"model": teacher_file, "device": "cpu"}
        return [
            (name, {**common, **QUICK[name], **changes.get(name.replace("-", "_"), {})})
            for name in names
        ]

    return make


@pytest.fixture
def prepare(store, stages_of):
    """A new run on the recording. What a worker counts and measures first is known to its forks
    from here."""
    recording = store.path(next(name for name, _ in store.names() if name.startswith("record")))
    for _, config in configs(JobSpec(stages=tuple(stages_of("probe"))), recording):
        needs(config)

    def make(kind: str, *names: str, **changes: dict) -> Path:
        upstream = next(name for name, _ in store.names() if name.startswith("record"))
        return store.prepare(kind, stages_of(*names, **changes), upstream, preview_seconds=0).path

    return make
