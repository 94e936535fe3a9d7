"""A node that waits for a job: what it shows, and how the job ends with it.

The work itself is done by a process of its own (`ppcl_engine.jobs`), in a folder that says how it
stands.
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
from ...ppcl_engine.jobs.state import LOG, PREVIEW, JobState, ask_to_cancel, current_state
from ..paths import runs
from .runs import check_recorded, folder_of, last_line, one_line, progress_text

EVERY = 0.2  # seconds between two looks
PATIENCE = 30.0  # seconds for a save
WIDEST = 1024  # pixels of a preview
FLAG = re.compile(r"--([a-z][a-z-]*)")


@dataclass(frozen=True, kw_only=True)
class Start:
    """wait: until the job has ended. start: now. keep_running: also when ComfyUI is closed."""

    wait: bool = True
    start: bool = True
    keep_running: bool = False
    preview_seconds: float = 30.0


class Screen:
    """What the page shows of a node while it works: a bar, a picture, a line. Only what has changed
    is sent."""

    def __init__(self, node_id: str | None):
        self.node_id = node_id
        self._shown: dict[str, object] = {}

    def show(self, folder: Path, state: JobState) -> None:
        if self.node_id is None:  # called by a program, not by the page
            return
        preview = self._changed("preview", _changed_at(folder / PREVIEW))
        if self._changed("step", (state.stage, state.step, state.steps)) or preview:
            picture = _thumbnail(folder / PREVIEW) if preview else None
            ComfyAPISync().execution.set_progress(
                state.step,
                max(state.steps, 1),
                node_id=self.node_id,
                preview_image=picture,
                ignore_size_limit=True,
            )
        self.say(progress_text(folder, state))

    def say(self, text: str) -> None:
        if self.node_id is not None and self._changed("text", text):
            from server import PromptServer  # there is none where nodes are called by a program

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
    bring=lambda folder: None,
) -> Path:
    """The folder of the run that does these stages: found again, prepared, started or done, as
    `how` says. `bring(folder)` puts files there that the stages read.

    Raises ValueError with the job's own line where it fails, the host's interrupt where the user
    stops it.
    """
    options = {"outlive": how.keep_running, "preview_seconds": how.preview_seconds}
    path = runs().prepare(kind, stages, upstream, **options).path
    bring(path)
    if not how.start or current_state(path).status == "done":
        return path
    leave_memory()
    process = runs().start(path)
    if how.wait:
        follow(path, screen, Worker(path, process))
    return path


def finish_upstream(name: str, wait: bool, screen: Screen) -> None:
    """Raises ValueError for a run before this one that is not done, unless it is at work and this
    one may wait."""
    check_recorded(name)
    folder = folder_of(name)
    if not (folder / "state.json").exists():  # a recording
        return
    state = current_state(folder)
    if state.status in ("failed", "cancelled"):
        raise ValueError(f"the run before, {name}, is {state.status}: {one_line(state.error)}")
    if state.status == "queued" and state.pid is None:
        raise ValueError(
            f"the run before, {name}, was prepared and not started; start it, then press Run again"
        )
    if not state.is_final:
        if not wait:
            raise ValueError(
                f"the run before, {name}, is still at work; turn wait on, or come back when it is done"
            )
        leave_memory()
        follow(folder, screen)


def leave_memory() -> None:
    """A job needs the device: the host's own models go."""
    memory.unload_all_models()
    memory.soft_empty_cache()


@dataclass
class Worker:
    """A job's process that this node answers for, as `RunStore.start` gives it; None where another
    one started it."""

    path: Path
    process: object | None

    def stop(self) -> JobState:
        """Asked to save and end; harder means follow where the process is ours."""
        if self.process is not None:
            stop(self.process, PATIENCE)
        else:
            ask_to_cancel(self.path)
        end = time.monotonic() + PATIENCE
        while not (state := current_state(self.path)).is_final and time.monotonic() < end:
            time.sleep(EVERY)
        return state

    def leave(self) -> None:
        """Whatever its state file says: a process of ours is told to save and end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def gone(self) -> None:
        """Its memory is free when the process has ended, a moment after its state says so."""
        end = time.monotonic() + PATIENCE
        while self.process is not None and self.process.poll() is None:
            if time.monotonic() > end:
                self.process.kill()
            time.sleep(EVERY)


def follow(path: Path, screen: Screen, worker: Worker | None = None) -> JobState:
    """Shows a job until it has ended. With `worker`, whatever ends this wait ends the job; without,
    the job goes on.

    Raises ValueError with the job's line when it failed, the host's interrupt when the user pressed
    cancel.
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
    """One line, in the words of the widgets."""
    if state.status == "cancelled":
        return f"{path.name} was cancelled at {state.step:,} of {state.steps:,} of {state.stage}; press Run to go on"
    said = last_line(path / LOG) if "worker ended" in state.error else ""
    line = in_words_of_widgets(one_line(state.error))
    return f"{path.name} failed: {line}" + (f" (its last words: {one_line(said)})" if said else "")


def in_words_of_widgets(text: str) -> str:
    """--learning-rate is the widget learning_rate."""
    return FLAG.sub(lambda match: match[1].replace("-", "_"), text)


def _changed_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _thumbnail(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((WIDEST, WIDEST))
    return picture


def screen_of(node: type) -> Screen:
    """Of a node at work; the host tells it its place in the graph."""
    hidden: Callable | None = getattr(node, "hidden", None)
    return Screen(getattr(hidden, "unique_id", None))
