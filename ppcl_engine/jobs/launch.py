"""The one place that starts a process: this interpreter, the worker's file, a run folder. Nothing
else reaches it.

No widget's text is in the command, the environment or the working folder: the run folder is the
host's output folder and a name of ours.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from .state import (
    CANCEL,
    LOG,
    JobState,
    ask_to_cancel,
    claimed,
    is_abandoned,
    process_of,
    read_state,
    write_state,
)

NAME = re.compile(r"[a-z0-9-]+")
LONGEST_NAME = 100
WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 30.0  # seconds for a save
Process = subprocess.Popen


def check_name(name: str) -> str:
    """Raises ValueError for text that cannot name a run."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise ValueError(
            f"{name[:LONGEST_NAME]!r} is not the name of a run (a-z, 0-9 and '-'); choose one from the list"
        )
    return name


def launch(folder: Path, outlive: bool) -> Process:
    """Starts the worker on a queued run, or on one whose worker is gone. It ends with this process
    unless `outlive`.

    Raises ValueError for a folder that is not named like a run, for a run that is at work and for one
    that has ended.
    """
    folder = Path(folder).absolute()
    check_name(folder.name)
    # the worker's first act is to claim it too, so it begins when its pid is written
    with claimed(folder):
        state = read_state(folder)
        if is_abandoned(state):
            (folder / CANCEL).unlink(missing_ok=True)
        elif state.status != "queued" or state.pid is not None:
            raise ValueError(
                f"{folder.name} is {state.status} already; watch it, or make another attempt"
            )
        process = _start(folder)
        write_state(folder, _queued(state, process.pid, outlive))
    return process


def stop(process: Process, patience: float = PATIENCE) -> int:
    """Asks it to save and end, then terminates, then kills it; waits `patience` seconds each time.
    Its exit code."""
    ask_to_cancel(Path(process.args[-1]))
    for harder in (process.terminate, process.kill):
        try:
            return process.wait(patience)
        except subprocess.TimeoutExpired:
            harder()
    return process.wait()


def prepared_command(folder: Path, processes: int = 1) -> str:
    """What a person types in a terminal to do the same, in any folder. --multi_gpu starts several
    processes also where there is no GPU; accelerate's --cpu would start one."""
    interpreter = [sys.executable]
    if processes > 1:
        interpreter += [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
        ]
    return _quoted([*interpreter, str(WORKER), str(Path(folder).absolute())])


def _start(folder: Path) -> Process:
    """A process group of its own, so that Ctrl-C in the host's terminal reaches the host alone."""
    if os.name == "nt":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    else:
        apart = {"start_new_session": True}
    with open(folder / LOG, "ab") as log:
        return subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            **apart,
        )


def _queued(state: JobState, child: int, outlive: bool) -> JobState:
    pid, started = process_of(child)
    parent, parent_started = (None, None) if outlive else process_of(os.getpid())
    return replace(
        state,
        status="queued",
        error="",
        pid=pid,
        process_started=started,
        host=platform.node(),
        parent_pid=parent,
        parent_started=parent_started,
    )


def _quoted(words: list[str]) -> str:
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
