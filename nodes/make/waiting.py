"""A node that waits for a job: what it shows meanwhile, and how it stops the job.

The work is done by another process (`ppcl_engine.jobs`), and the files in the run's folder say how
it stands.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as memory
from comfy_api.v0_0_2 import ComfyAPISync
from PIL import Image

from ...ppcl_engine.jobs.launch import stop
from ...ppcl_engine.jobs.state import (
    LOG,
    PREVIEW,
    JobState,
    ask_to_cancel,
    current_state,
    read_events,
)
from ...ppcl_engine.jobs.whole_job import share_done, stage_seconds
from ..paths import runs
from .runs import check_recorded, folder_of, last_line, one_line, progress_text

EVERY = 0.2  # seconds between two looks at the state
PATIENCE = 30.0  # seconds that a job has to save and end
WIDEST = 1024  # pixels of a preview
BAR = 1000  # parts of a bar over several stages
FLAG = re.compile(r"--([a-z][a-z-]*)")


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a job is started."""

    wait: bool = True
    """until it has ended"""
    start: bool = True
    """now; otherwise it is only prepared"""
    keep_running: bool = False
    """even when ComfyUI is closed"""
    preview_seconds: float = 30.0
    """between two previews; 0: none"""


class Screen:
    """What the page shows of a node while it works: a bar over the whole job, a picture and a line. Only
    changes are sent."""

    def __init__(self, node_id: str | None):
        self.node_id = node_id
        self._shown: dict[str, object] = {}
        self._seconds: dict[int, float] = {}
        self._furthest = 0

    def show(self, folder: Path, state: JobState) -> None:
        if self.node_id is None:  # called by a program, not by the page
            return
        preview = self._changed("preview", _changed_at(folder / PREVIEW))
        if self._changed("step", (state.stage, state.step, state.steps)) or preview:
            picture = _thumbnail(folder / PREVIEW) if preview else None
            self._send(*self._bar(folder, state), picture)
        self.say(progress_text(folder, state))

    def picture(self, picture: Image.Image) -> None:
        """Shows a picture before the first preview."""
        if self.node_id is not None:
            self._send(0, 1, picture)

    def _bar(self, folder: Path, state: JobState) -> tuple[int, int]:
        """(how far, of how much). Of several stages the bar shows all, and never falls, although a stage
        may count several things one after the other."""
        if state.stages < 2:
            return state.step, max(state.steps, 1)
        if not self._seconds and state.number:
            self._seconds = stage_seconds(read_events(folder))
        done = 1.0 if state.status == "done" else share_done(state, self._seconds)
        self._furthest = max(self._furthest, round(BAR * done))
        return self._furthest, BAR

    def _send(self, done: int, most: int, picture: Image.Image | None) -> None:
        ComfyAPISync().execution.set_progress(
            done, most, node_id=self.node_id, preview_image=picture, ignore_size_limit=True
        )

    def say(self, text: str) -> None:
        if self.node_id is not None and self._changed("text", text):
            # imported here: programs that call nodes without a server do not have it
            from server import PromptServer

            PromptServer.instance.send_progress_text(text, self.node_id)

    def _changed(self, name: str, value: object) -> bool:
        before, self._shown[name] = self._shown.get(name), value
        return value is not None and value != before


def run_job(
    kind: str,
    stages: list[tuple[str, dict]],
    upstream: str,
    how: Start,
    screen: Screen,
    bring: Callable[[Path], None] = lambda folder: None,
    check: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Prepares the run of these stages, or finds it again, and starts it and waits as `how` says.
    Returns its folder. bring(folder): puts files there that the stages read; check(folder): raises
    ValueError if a job that was never started should not be.

    Raises ValueError with the job's own message if it fails, and the host's interrupt if the user
    stops it.
    """
    options = {"outlive": how.keep_running, "preview_seconds": how.preview_seconds}
    prepared = runs().prepare(kind, stages, upstream, **options)
    path = prepared.path
    bring(path)
    if not how.start or current_state(path).status == "done":
        return path
    if prepared.is_new:
        check(path)
    leave_memory()
    process = runs().start(path)
    if how.wait:
        follow(path, screen, Worker(path, process))
    return path


def finish_upstream(name: str, wait: bool, screen: Screen) -> None:
    """Makes sure that the run which a node needs is finished: waits for it if it is running and `wait`
    is on, else raises ValueError."""
    check_recorded(name)
    folder = folder_of(name)
    if not (folder / "state.json").exists():  # a recording
        return
    state = current_state(folder)
    if state.status in ("failed", "cancelled"):
        raise ValueError(
            f"run {name}, which this node needs, {state.in_words}: {one_line(state.error)}"
        )
    if state.status == "queued" and state.pid is None:
        raise ValueError(
            f"run {name}, which this node needs, was prepared but not started; start it, then press Run again"
        )
    if not state.is_final:
        if not wait:
            raise ValueError(
                f"run {name}, which this node needs, is still running; turn wait on, or come back when it is done"
            )
        leave_memory()
        follow(folder, screen)


def leave_memory() -> None:
    """Unloads the host's own models: a job needs the device's memory."""
    memory.unload_all_models()
    memory.soft_empty_cache()


@dataclass
class Worker:
    """A job that this node has to stop when its wait ends."""

    path: Path
    """the run's folder"""
    process: object | None
    """as `RunStore.start` gives it; None if something else started the job"""

    def stop(self) -> JobState:
        """Asks the job to save and end, and waits for that; a process of this node is killed if it
        does not. Returns the last state."""
        if self.process is not None:
            stop(self.process, PATIENCE)
        else:
            ask_to_cancel(self.path)
        end = time.monotonic() + PATIENCE
        while not (state := current_state(self.path)).is_final and time.monotonic() < end:
            time.sleep(EVERY)
        return state

    def leave(self) -> None:
        """Tells the process, if it is this node's, to save and end, and does not wait for it."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def gone(self) -> None:
        """Waits until the process has ended and freed its memory, a moment after its state says that
        the job has ended."""
        end = time.monotonic() + PATIENCE
        while self.process is not None and self.process.poll() is None:
            if time.monotonic() > end:
                self.process.kill()
            time.sleep(EVERY)


def follow(path: Path, screen: Screen, worker: Worker | None = None) -> JobState:
    """Shows a job until it has ended. With `worker`, whatever ends this wait also ends the job;
    without it, the job goes on.

    Raises ValueError with the job's own message if it failed, and the host's interrupt if the user
    pressed Cancel.
    """
    try:
        while not (state := current_state(path)).is_final:
            screen.show(path, state)
            if memory.processing_interrupted():
                screen.say(
                    _stopped(worker)
                    if worker
                    else f"{path.name} goes on; Cancel Job (PPCL) stops it"
                )
                memory.throw_exception_if_processing_interrupted()
            time.sleep(EVERY)
    except BaseException:
        if worker is not None:
            worker.leave()
        raise
    if worker is not None:
        worker.gone()
    screen.show(path, state)
    if state.status != "done":
        raise ValueError(failure_text(path, state))
    return state


def _stopped(worker: Worker) -> str:
    state = worker.stop()
    return f"stopped at {state.step:,} of {state.steps:,} of {state.stage}, all of it saved; press Run again to go on"


def failure_text(path: Path, state: JobState) -> str:
    """Why a job did not finish, in one line, with the widgets' names."""
    if state.status == "cancelled":
        return f"{path.name} was cancelled at {state.step:,} of {state.steps:,} of {state.stage}; press Run to go on"
    said = last_line(path / LOG) if "worker ended" in state.error else ""
    line = in_words_of_widgets(one_line(state.error))
    return f"{path.name} failed: {line}" + (f" (its last words: {one_line(said)})" if said else "")


def in_words_of_widgets(text: str) -> str:
    """A message with the widgets' names for settings: --learning-rate becomes learning_rate."""
    return FLAG.sub(lambda match: match[1].replace("-", "_"), text)


def _changed_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _thumbnail(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((WIDEST, WIDEST))
    return picture


def screen_of(node: type) -> Screen:
    """The screen of a node at work, by the id that the host gives it."""
    hidden: Callable | None = getattr(node, "hidden", None)
    return Screen(getattr(hidden, "unique_id", None))
