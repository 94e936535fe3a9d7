"""A job's state: which file of its run folder says what, who writes it, and when. This is the
contract.

run.json       what to do (`spec.py`). Written once, before the folder gets its name.
state.json     a `JobState`, always replaced whole. Written by whoever holds `worker.lock`: the
launcher (queued, with
               the process it started), then the worker: at once, at every change of stage, while it
               works at most every 0.3 s and at least every 5 s, and at its end.
events.jsonl   one JSON object a line, only ever appended: {"time", "kind", ...}. Kinds: continued
(run, finished: how
               many stages an earlier attempt had done), started (pid), estimated, stage (number,
               stage), saved (stage, step), preview (seconds that it took), finished (number,
               stage), process_failed (rank, error; of several processes one that is not the first),
               done, failed (error), cancelled (error).
metrics.csv    time,what,step,loss; one line an update. Written by the worker.
preview.png    the loss so far and, where the model can draw, pictures; replaced whole by the
worker. log.txt        what a launched worker printed; a Python traceback is here and nowhere else.
cancel         asks the worker to stop. Written by anyone (`ask_to_cancel`), empty; it stays.
worker.lock    locked by the one worker of the folder for as long as it lives, or by a stage of the
command line. holder.json    who has it, since when: for those that it keeps out (`run_lock`).
All of them, and all that stages write, are real files: a folder with a link in it is refused.

Status: queued -> running -> done | failed | cancelled, with stopping between running and cancelled.
The last three are final: nothing is written after them, and another attempt is another folder
(`RunStore.prepare`, or the worker's --again). A worker that was killed leaves `running`, which is
true only while the process (pid, started at that time, on that host) is there. Who only looks calls
`current_state`: it says failed then, but writes nothing, since a worker started on the folder goes
on from what is saved. `settle` writes it down, and the store does so before it makes another
attempt.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

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
LARGEST = 100_000  # bytes of a state file; ours have less than a thousand
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
"""largest values of numbers; what is larger the operating system does not know"""
# seconds after which a worker on another machine is believed to be gone; it writes every few
SILENT = 120.0
CLOCK = 2.0  # seconds: what clocks may shift between two looks at a process's start


@dataclass(frozen=True, kw_only=True)
class JobState:
    """status; stage, its number of stages (from 1); step of steps of `what`, as the terminal's bar
    counts them; rate in steps a second and seconds_left, both of this bar; last_good_step: what is
    safe on disk; pid, process_started (seconds since 1970) and host of the worker; parent_pid,
    parent_started: of who launched it, where the job ends with that process; error: the last one,
    in a line; updated: seconds since 1970."""

    status: Status
    stage: str = ""
    number: int = 0
    stages: int = 0
    what: str = ""
    step: int = 0
    steps: int = 0
    rate: float | None = None
    seconds_left: float | None = None
    last_good_step: int = 0
    pid: int | None = None
    process_started: float | None = None
    host: str = ""
    parent_pid: int | None = None
    parent_started: float | None = None
    error: str = ""
    updated: float = 0.0

    @property
    def is_final(self) -> bool:
        return self.status in FINAL


def read_state(folder: Path) -> JobState:
    """As it is on disk. Raises ValueError, in one line, for a missing file, rubbish, or an unknown
    status."""
    path = Path(folder) / STATE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; prepare the run first")
    if path.stat().st_size > LARGEST:
        raise ValueError(
            f"{path} is not a job's state: it has {path.stat().st_size:,} bytes; remove the folder"
        )
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a job's state: not a JSON object; remove the folder")
    state = from_mapping(JobState, values, str(path))
    for name, most in BOUNDS.items():
        value = getattr(state, name)
        if value is not None and not 0 <= value <= most:
            raise ValueError(
                f"{path}: {name} = {value} is not from 0 to {most:,}; remove the folder"
            )
    return state


def write_state(folder: Path, state: JobState) -> JobState:
    """Replaces the state. Raises ValueError when the one on disk is final. Returns what was
    written."""
    folder = Path(folder)
    if (folder / STATE).exists() and (before := read_state(folder)).is_final:
        raise ValueError(
            f"{folder.name} is {before.status}, and that is final; make another attempt (--again)"
        )
    state = replace(state, updated=time.time())
    write_json(folder / STATE, asdict(state))
    return state


def current_state(folder: Path) -> JobState:
    """What is true now: as on disk, or failed when the process that should be at work is gone.
    Writes nothing."""
    state = read_state(folder)
    if not is_abandoned(state):
        return state
    state = read_state(folder)  # it may have ended properly since the first look
    return (
        replace(state, status="failed", error=_abandoned(state)) if is_abandoned(state) else state
    )


def settle(folder: Path) -> JobState:
    """`current_state`, written down where a worker is gone. Raises ValueError when one is at work
    after all."""
    state = read_state(folder)
    if not is_abandoned(state):
        return state
    with claimed(folder):
        state = current_state(folder)
        return end(folder, state) if is_abandoned(read_state(folder)) else state


def is_abandoned(state: JobState) -> bool:
    """Its process is gone without a final state. One on another machine cannot be seen from here,
    but heard."""
    if state.is_final or state.pid is None:
        return False
    if state.host != platform.node():
        return time.time() - state.updated > SILENT
    return not is_alive(state.pid, state.process_started or 0.0)


def is_alive(pid: int, started: float) -> bool:
    """Whether the process that started at that time is still there; a pid alone is given to others
    later."""
    try:
        process = psutil.Process(pid)
        return (
            abs(process.create_time() - started) < CLOCK
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return False


def process_of(pid: int) -> tuple[int, float]:
    """(pid, when it started)"""
    return pid, psutil.Process(pid).create_time()


@contextmanager
def claimed(folder: Path, seconds: float = 0.0, doing: str = "") -> Iterator[None]:
    """The folder's lock; it is free again when its process dies. Raises ValueError when another
    process has it and keeps it for so many seconds, and for a folder with links."""
    refuse_links(folder)
    with locked(folder, doing, seconds):
        yield


def refuse_links(folder: Path) -> None:
    """Raises ValueError naming a link below the folder: what is written through it would land
    somewhere else."""
    for place, folders, files in os.walk(folder):
        links = [name for name in (*folders, *files) if os.path.islink(os.path.join(place, name))]
        if links:
            raise ValueError(
                f"{os.path.join(place, links[0])} is a link; a run folder holds real files only"
            )


def ask_to_cancel(folder: Path) -> None:
    """The worker saves and ends; a run that no worker has begun is cancelled at once; one that has
    ended stays."""
    folder = Path(folder)
    state = current_state(folder)
    if state.is_final:
        return
    refuse_links(folder)
    (folder / CANCEL).touch()
    if state.status == "queued" and state.pid is None:
        # a worker that begins at this moment sees the file
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
    """Oldest first; empty without a file. Raises ValueError naming a line that is not an event.

    A last line without an end is one that a killed worker had begun: it does not count.
    """
    path = Path(folder) / EVENTS
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]
    return [_event(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def finished_stages(events: list[dict]) -> int:
    """How many stages are done, those of the earlier attempt that this one goes on from among
    them."""
    carried = sum(
        e["finished"]
        for e in events
        if e["kind"] == "continued" and isinstance(e.get("finished"), int)
    )
    return carried + sum(e["kind"] == "finished" for e in events)


def append_line(path: Path, line: str) -> None:
    """Behind the last whole line: what a killed process left of one is cut off."""
    with open(path, "ab+") as file:
        file.seek(0)
        content = file.read() if _is_torn(file) else b""
        if content:
            file.truncate(content.rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")


def _is_torn(file) -> bool:
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
        raise ValueError(f"{where} is not an event; remove the file, or the folder")
    return value


def _abandoned(state: JobState) -> str:
    if state.status == "queued":
        return f"the worker ended before it began; {LOG} in the run folder says why"
    return (
        f"the worker ended without a word (killed, or the machine ran out of memory) at step {state.step} of "
        f"{state.stage or 'its start'}; start it again to go on"
    )
