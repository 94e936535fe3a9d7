"""The listener that writes a worker's progress to state.json, events.jsonl and metrics.csv."""

from __future__ import annotations

import csv
import io
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .state import METRICS, JobState, append_event, append_line, write_state

# seconds between two writes of the state: after a change, and without one
EVERY, HEARTBEAT = 0.3, 5.0
# each of their steps ends with a file on disk
SAFE_AT_EVERY_STEP = {"calibrate", "probe", "detect", "sparsify"}


class Reporter:
    """Stages call it from the main thread; the cancel listener's thread calls `write`, so that no stage waits
    for the disk."""

    def __init__(self, folder: Path, state: JobState, asked: Callable[[], bool]):
        self.folder = folder
        self.asked = asked
        """whether the job has been asked to stop"""
        self.draw: Callable[[bool], bool] = lambda finished: False
        """draw(finished) draws the preview, `finished` at the end of a stage; whether it is a new one"""
        self.state = state
        self._rows: list[tuple[float, str, int, float]] = []
        self._lock, self._written, self._news, self._since_asked = threading.Lock(), 0.0, True, 0

    def begin(self, number: int, stage: str) -> None:
        """Records that a stage begins."""
        self._change(
            number=number,
            stage=stage,
            what="",
            step=0,
            steps=0,
            rate=None,
            seconds_left=None,
            last_good_step=0,
        )
        self.write(always=True)
        append_event(self.folder, "stage", number=number, stage=stage)

    def finish(self) -> None:
        """Records that the stage is finished."""
        self.write(always=True)
        append_event(self.folder, "finished", number=self.state.number, stage=self.state.stage)
        self._draw(finished=True)

    def advanced(self, what: str, step: int, steps: int | None, rate: float | None) -> None:
        left = (steps - step) / rate if rate and steps else None
        good = (
            {"last_good_step": step}
            if what == self.state.stage and what in SAFE_AT_EVERY_STEP
            else {}
        )
        self._change(
            what=what, step=int(step), steps=int(steps or 0), rate=rate, seconds_left=left, **good
        )
        self._insist()

    def measured(self, what: str, step: int, loss: float) -> None:
        with self._lock:
            self._rows.append((time.time(), what, step, loss))

    def saved(self) -> None:
        self._change(last_good_step=self.state.step)
        append_event(self.folder, "saved", stage=self.state.stage, step=self.state.step)
        self._draw(finished=False)

    def stopping(self, reason: str) -> None:
        self._change(status="stopping", error=reason)
        self._written = 0.0  # the next write is due at once

    def write(self, always: bool = False) -> None:
        """The state, and the losses measured since the last write. Unless `always`, only when a write
        is due."""
        with self._lock:
            waited = time.monotonic() - self._written
            if not always and waited < (EVERY if self._news else HEARTBEAT):
                return
            self.state = write_state(self.folder, self.state)
            self._written, self._news = time.monotonic(), False
            if self._rows:
                append_line(self.folder / METRICS, _csv(self._rows))
                self._rows = []

    def _draw(self, finished: bool) -> None:
        self.write(always=True)  # the curve is drawn from the file
        begun = time.monotonic()
        if self.draw(finished):
            append_event(self.folder, "preview", seconds=time.monotonic() - begun)

    def _change(self, **values) -> None:
        with self._lock:
            self.state, self._news = replace(self.state, **values), True

    def _insist(self) -> None:
        """Interrupts again if the stage goes on after it was asked to stop: Python drops an interrupt
        that arrives where exceptions are ignored, as in a destructor."""
        self._since_asked += self.asked()
        if self._since_asked > 3:  # a training loop saves and stops within one step
            self._since_asked = 0
            raise KeyboardInterrupt


def _csv(rows: list[tuple]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")
