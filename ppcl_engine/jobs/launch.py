"""The only place that starts a process. Its command is this interpreter, the worker's file and a run
folder, nothing else.

No text that a user typed into a widget reaches the command, the environment or the working folder:
the run folder is the host's output folder and a name that the store made.
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
from typing import cast

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
PATIENCE = 30.0  # seconds that a stage may take to save
Process = subprocess.Popen


def check_name(name: str) -> str:
    """Raises ValueError for text that cannot name a run."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise ValueError(
            f"{name[:LONGEST_NAME]!r} is not the name of a run (a-z, 0-9 and '-'); choose one from the list"
        )
    return name


def launch(folder: Path, outlive: bool) -> Process:
    """Starts the worker of a queued run, or of one whose worker is gone. Unless `outlive`, the worker
    ends when this process does.

    Raises ValueError if the folder's name is not a run's, or if the run is running or has ended.
    """
    folder = Path(folder).absolute()
    check_name(folder.name)
    # the worker claims the folder first of all, so it waits until its pid is written
    with claimed(folder):
        state = read_state(folder)
        if is_abandoned(state):
            (folder / CANCEL).unlink(missing_ok=True)
        elif state.status != "queued" or state.pid is not None:
            raise ValueError(
                f"{folder.name} {state.in_words} already; watch it, or make another attempt"
            )
        process = _start(folder)
        write_state(folder, _queued(state, process.pid, outlive))
    return process


def stop(process: Process, patience: float = PATIENCE) -> int:
    """Asks a worker to save and end, then terminates it, then kills it, waiting `patience` seconds
    each time. Returns its exit code."""
    command = cast(list[str], process.args)  # of `_start`: it ends with the folder
    ask_to_cancel(Path(command[-1]))
    for end_it in (process.terminate, process.kill):
        try:
            return process.wait(patience)
        except subprocess.TimeoutExpired:
            end_it()
    return process.wait()


def prepared_command(folder: Path, processes: int = 1) -> str:
    """The command that runs the same worker from a terminal, in any working folder."""
    interpreter = [sys.executable]
    if processes > 1:
        # --multi_gpu starts several processes even without a GPU; --cpu would start only one
        interpreter += [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
        ]
    return _quoted([*interpreter, str(WORKER), str(Path(folder).absolute())])


def _start(folder: Path) -> Process:
    """Gives the worker a process group of its own, so that Ctrl-C in the host's terminal reaches only
    the host."""
    flags = 0  # of Windows alone
    if os.name == "nt":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
    with open(folder / LOG, "ab") as log:
        return subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            creationflags=flags,
            start_new_session=os.name != "nt",
        )


def _queued(state: JobState, child: int, outlive: bool) -> JobState:
    """The state with the worker's process in it, and this process as its parent unless `outlive`."""
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
