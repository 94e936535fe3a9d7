"""Progress of long work: a bar in the terminal, a line now and then where there is none, and a
listener (a job's worker).

Stages know nothing of jobs: they advance a bar, report a loss, and say when trained parts are
safely on disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from tqdm import tqdm

from .distributed import alone, processes

EVERY = 30.0  # seconds between two lines of a bar that is not in a terminal
SOONER, SHARE = 5.0, 0.1  # or this time, when so much more is done
LINE = (
    "{desc}: {percentage:3.0f} % {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)


class Listener(Protocol):
    def advanced(self, what: str, step: int, steps: int | None, rate: float | None) -> None:
        """`step` of the bar's `steps` are done, at `rate` steps a second (None: not known yet)."""

    def measured(self, what: str, step: int, loss: float) -> None:
        """The loss before update `step` of `what`, such as "interval 3-4"; for "layer attn.to_q"
        its error in block `step`."""

    def saved(self) -> None:
        """Everything made so far is on disk, so that a picture can be drawn with it."""


_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def measured(what: str, step: int, loss: float) -> None:
    if (listener := _LISTENER.get()) is not None:
        listener.measured(what, step, loss)


def saved() -> None:
    if (listener := _LISTENER.get()) is not None:
        with alone():
            listener.saved()


class Progress(tqdm):
    """A bar that tells the listener about every step; of several processes only the main one draws
    it."""

    def __init__(self, *arguments, **named):
        self._line_at, self._line_n = time.monotonic(), named.get("initial", 0)
        super().__init__(*arguments, **{"disable": not processes().is_main, **named})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draws the bar; where there is no terminal, in a log say, writes a line if one is due, and the
        last one."""
        if self.fp.isatty():
            return bool(super().display(msg, pos))
        ends = self.disable  # tqdm turns a bar off before it closes it, and then ends the line
        if msg is None and (ends or self._is_due()):
            self._line_at, self._line_n = time.monotonic(), self.n
            text = self.format_meter(**{**self.format_dict, "bar_format": LINE})
            self.fp.write(text if ends else f"{text}\n")
            self.fp.flush()
        return False

    def _is_due(self) -> bool:
        passed = time.monotonic() - self._line_at
        more = self.total and self.n - self._line_n >= SHARE * self.total
        # the end is said when the bar is closed
        return passed >= (SOONER if more else EVERY) and self.n != self.total

    def update(self, n: float = 1) -> bool | None:
        drawn = super().update(n)
        self._tell()
        return drawn

    def __iter__(self):
        for done, item in enumerate(super().__iter__(), start=self.n):
            yield item
            self._tell(done + 1)

    @classmethod
    def close_all(cls) -> None:
        """Ends the lines of bars that an error left open, so that the next message starts on a new
        line."""
        for bar in list(getattr(cls, "_instances", ())):  # tqdm's own, which its types do not name
            bar.close()

    def _tell(self, done: int | None = None) -> None:
        listener = _LISTENER.get()
        if listener is None or self.disable:
            return
        done = int(self.n) if done is None else done
        seconds = self.format_dict["elapsed"]
        rate = (done - self.initial) / seconds if seconds > 0 and done > self.initial else None
        listener.advanced(self.desc or "", done, self.total, rate)
