"""The state of a job. This is the contract: which file of its run folder says what, who writes it, and
when.

run.json       What to do (`spec.py`). Written once, before the folder gets its name.
state.json     A `JobState`, always replaced whole. Written by the process that holds `worker.lock`: the
               launcher (status queued, with the process that it started), then the worker: when it
               starts, at every change of stage, while it works at most every 0.3 s and at least every
               5 s, and when it ends.
events.jsonl   One JSON object a line, only ever appended: {"time", "kind", ...}. Kinds: continued (run,
               finished: how many stages an earlier attempt had done), started (pid), estimated, stage
               (number, stage), saved (stage, step), preview (seconds that it took), finished (number,
               stage), process_failed (rank, error; of several processes, one that is not the first),
               done, failed (error), cancelled (error).
metrics.csv    time,what,step,loss; one line for each update. Written by the worker.
preview.png    The loss so far and, where the model can draw, pictures; replaced whole by the worker.
log.txt        What a launched worker printed; a Python traceback is here and nowhere else.
cancel         Empty. Asks the worker to stop; anyone may write it (`ask_to_cancel`), and it stays.
worker.lock    Locked by the folder's only worker for as long as it lives, or by a stage that the
               command line runs there.
holder.json    Who holds the lock and since when, for the processes that it keeps out (`run_lock`).
All of these, and all files that stages write, are real files: a folder with a link in it is refused.

Status: queued -> running -> done | failed | cancelled, with stopping between running and cancelled. The
last three are final: nothing is written after them, and another attempt is another folder
(`RunStore.prepare`, or the worker's --again). A worker that was killed leaves `running` behind, which
holds only while its process (pid, started at that time, on that host) exists. `current_state` then
reports failed, but writes nothing, because a worker started on the folder can still go on from what is
saved. `settle` writes the failure down; the store does so before it makes another attempt.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import psutil

from ..settings.base_settings import from_mapping
from ..system.atomic import read_json, write_json
from ..system.json_text import NotJSON, json_text, parse_json
from ..system.run_lock import locked

Status = Literal["queued", "running", "stopping", "done", "failed", "cancelled"]
STATUSES: tuple[str, ...] = get_args(Status)
FINAL = frozenset({"done", "failed", "cancelled"})
STATE, EVENTS, CANCEL, LOG = "state.json", "events.jsonl", "cancel", "log.txt"
METRICS, PREVIEW = "metrics.csv", "preview.png"
LARGEST = 100_000  # bytes of a state file; a real one has less than a thousand
BOUNDS = {
    "number": 1000,
    "stages": 1000,
    "step": 1 << 53,
    "steps": 1 << 53,
    "last_good_step": 1 << 53,
    "pid": 1 << 31,
    "parent_pid": 1 << 31,
    "updated": 1e11,
    "process_started": 1e11,
    "parent_started": 1e11,
}
"""largest values of the state's numbers; the operating system has no larger pids and times"""
# seconds without a write after which a worker on another machine counts as gone; it writes every few
SILENT = 120.0
CLOCK = 2.0  # seconds by which two readings of a process's start time may differ


@dataclass(frozen=True, kw_only=True)
class JobState:
    """state.json: how far a job is, and which process works on it. Times are seconds since 1970."""

    status: Status
    stage: str = ""
    """the stage that runs, or ran last"""
    number: int = 0
    """of that stage in the job, from 1; 0 before the first"""
    stages: int = 0
    """how many stages the job has"""
    what: str = ""
    """what the progress bar counts, such as a stage or "velocity small"; `step` to `seconds_left` are its"""
    step: int = 0
    steps: int = 0
    """how many there will be; 0: not known"""
    rate: float | None = None
    """steps a second; None: not known yet"""
    seconds_left: float | None = None
    """None: not known yet"""
    last_good_step: int = 0
    """the last step whose result is safe on disk"""
    pid: int | None = None
    """of the worker; None: none was started"""
    process_started: float | None = None
    """when that process started: another process may get its pid later"""
    host: str = ""
    """name of the machine that the worker runs on"""
    parent_pid: int | None = None
    """of the process that launched the worker; None if the job may outlive it"""
    parent_started: float | None = None
    """when that process started"""
    error: str = ""
    """the last error, or why the job stopped, in one line"""
    updated: float = 0.0
    """when this state was written"""

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def in_words(self) -> str:
        """The status as a sentence about the job goes on, such as "has failed"."""
        match self.status:
            case "failed":
                return "has failed"
            case "cancelled":
                return "was cancelled"
        return f"is {self.status}"


def read_state(folder: Path) -> JobState:
    """The state on disk. Raises ValueError, in one line, if the file is missing or malformed, or has an
    unknown status."""
    path = Path(folder) / STATE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; prepare the run first")
    if path.stat().st_size > LARGEST:
        raise ValueError(
            f"{path} is too large for a job's state: {path.stat().st_size:,} bytes; remove the folder"
        )
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} does not hold a job's state: it is not a JSON object; remove the folder"
        )
    state = from_mapping(JobState, values, str(path))
    for name, most in BOUNDS.items():
        value = getattr(state, name)
        if value is not None and not 0 <= value <= most:
            raise ValueError(
                f"{path}: {name} = {value} is not between 0 and {most:,}; remove the folder"
            )
    return state


def write_state(folder: Path, state: JobState) -> JobState:
    """Replaces the state on disk. Returns it with the time of writing. Raises ValueError if the one on
    disk is final."""
    folder = Path(folder)
    if (folder / STATE).exists() and (before := read_state(folder)).is_final:
        raise ValueError(
            f"{folder.name} {before.in_words}, and that is final; make another attempt (--again)"
        )
    state = replace(state, updated=time.time())
    write_json(folder / STATE, asdict(state))
    return state


def current_state(folder: Path) -> JobState:
    """The state on disk, or failed if the process that should be running is gone. Writes nothing."""
    state = read_state(folder)
    if not is_abandoned(state):
        return state
    state = read_state(folder)  # it may have ended properly since it was read
    if not is_abandoned(state):
        return state
    return replace(state, status="failed", error=_abandoned(state))


def settle(folder: Path) -> JobState:
    """`current_state`, also written to disk if the worker is gone. Raises ValueError if another worker
    has started meanwhile."""
    state = read_state(folder)
    if not is_abandoned(state):
        return state
    with claimed(folder):
        state = current_state(folder)
        return end(folder, state) if is_abandoned(read_state(folder)) else state


def is_abandoned(state: JobState) -> bool:
    """Whether its process is gone without having written a final state. A process on another machine
    counts as gone when it has not written for a while."""
    if state.is_final or state.pid is None:
        return False
    if state.host != platform.node():
        return time.time() - state.updated > SILENT
    return not is_alive(state.pid, state.process_started or 0.0)


def is_alive(pid: int, started: float) -> bool:
    """Whether the process that started at that time still exists; its pid alone may belong to another
    one by now."""
    try:
        process = psutil.Process(pid)
        return (
            abs(process.create_time() - started) < CLOCK
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return False


def process_of(pid: int) -> tuple[int, float]:
    """(pid, start time)"""
    return pid, psutil.Process(pid).create_time()


@contextmanager
def claimed(folder: Path, seconds: float = 0.0, doing: str = "") -> Iterator[None]:
    """Holds the folder's lock, which the system releases if this process dies.

    Raises ValueError if another process still has it after so many seconds, and for a folder with
    links.
    """
    refuse_links(folder)
    with locked(folder, doing, seconds):
        yield


def refuse_links(folder: Path) -> None:
    """Raises ValueError naming a link below the folder: a file written through it would land somewhere
    else."""
    for parent, folders, files in os.walk(folder):
        paths = [os.path.join(parent, name) for name in (*folders, *files)]
        if links := [path for path in paths if os.path.islink(path)]:
            raise ValueError(
                f"{links[0]} is a link; replace it by the file itself, a run folder holds real files only"
            )


def ask_to_cancel(folder: Path) -> None:
    """Asks the worker to save and end. A run that no worker has started is cancelled at once; one that
    has ended stays as it is."""
    folder = Path(folder)
    state = current_state(folder)
    if state.is_final:
        return
    refuse_links(folder)
    (folder / CANCEL).touch()
    if state.status == "queued" and state.pid is None:
        # if a worker starts at this very moment, it has the lock, and it sees the file
        with suppress(ValueError), claimed(folder):
            end(
                folder,
                replace(read_state(folder), status="cancelled", error="cancelled before it began"),
            )


def end(folder: Path, state: JobState) -> JobState:
    """Writes a final state and its event."""
    assert state.is_final
    written = write_state(folder, replace(state, rate=None, seconds_left=None))
    append_event(folder, state.status, **({"error": state.error} if state.error else {}))
    return written


def cancel_asked(folder: Path) -> bool:
    return (Path(folder) / CANCEL).exists()


def append_event(folder: Path, kind: str, **values) -> None:
    append_line(Path(folder) / EVENTS, json_text({"time": time.time(), "kind": kind, **values}))


def read_events(folder: Path) -> list[dict]:
    """Oldest first; empty if there is no file. Raises ValueError naming a line that is not an event.

    A last line without a line feed is ignored: a worker was killed while it wrote it.
    """
    path = Path(folder) / EVENTS
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]
    return [_event(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def finished_stages(events: Sequence[dict]) -> int:
    """How many stages are done, including those of the earlier attempt that this one continues."""
    carried = sum(
        e["finished"]
        for e in events
        if e["kind"] == "continued" and isinstance(e.get("finished"), int)
    )
    return carried + sum(e["kind"] == "finished" for e in events)


def append_line(path: Path, line: str) -> None:
    """Appends a line; a part of a line that a killed process left at the end is cut off first."""
    with open(path, "ab+") as file:
        file.seek(0)
        content = file.read() if _is_torn(file) else b""
        if content:
            file.truncate(content.rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")


def _is_torn(file: BinaryIO) -> bool:
    """Whether the last line has no line feed. Leaves the file at its start."""
    end = file.seek(0, os.SEEK_END)
    if not end:
        return False
    file.seek(end - 1)
    torn = file.read(1) != b"\n"
    file.seek(0)
    return torn


def _event(line: str, where: str) -> dict:
    try:
        value = parse_json(line)
    except NotJSON:
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError(f"{where}: not an event of a job; remove the file, or the folder")
    return value


def _abandoned(state: JobState) -> str:
    if state.status == "queued":
        return f"the worker ended before its first stage; {LOG} in the run folder says why"
    return (
        f"the worker ended without a word (killed, or the machine ran out of memory) at step {state.step} of "
        f"{state.stage or 'its start'}; start it again to go on"
    )
