"""What long work tells while it runs: a bar in the terminal, and whoever listens (a job's worker).

Stages know nothing of jobs: they draw a bar, name a loss, say when trained parts are safe on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from tqdm import tqdm

from .distributed import alone, processes


class Listener(Protocol):
    def advanced(self, what: str, step: int, steps: int | None, rate: float | None) -> None:
        """`step` of `steps` of what the bar counts are done, at `rate` steps a second (None: not
        known yet)."""

    def measured(self, what: str, step: int, loss: float) -> None:
        """The loss before update `step` of `what`, such as "interval 3-4"; of "layer attn.to_q" its
        error in block `step`."""

    def saved(self) -> None:
        """Everything made so far is on disk: a moment to draw with it."""


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
    """A bar whose every step the listener hears; of several processes the main one draws it."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **{"disable": not processes().is_main, **named})

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
        """Ends the lines of bars that an error left open, so that what is said next begins a
        line."""
        for bar in list(cls._instances):
            bar.close()

    def _tell(self, done: int | None = None) -> None:
        listener = _LISTENER.get()
        if listener is None or self.disable:
            return
        done = self.n if done is None else done
        seconds = self.format_dict["elapsed"]
        rate = (done - self.initial) / seconds if seconds > 0 and done > self.initial else None
        listener.advanced(self.desc or "", done, self.total, rate)
