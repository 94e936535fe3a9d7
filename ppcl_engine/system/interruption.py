"""Ctrl-C: a stage saves, stops, and says how to go on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .distributed import processes


class Stopped(Exception):
    """Stopped by Ctrl-C, with everything saved. The message says how to go on."""


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields `asked()`. The first Ctrl-C only sets it, so that the caller can save; the second
    interrupts. The caller need not stop in its last step: then the interrupt comes when it leaves, so
    that no further stage begins.

    Processes that share batches all get the same answer at the same step. A launcher passes on the
    Ctrl-C that its processes have already received, so there the second one does nothing (the
    launcher kills them after half a minute).
    """
    asked: list[int] = []
    several = processes().count > 1

    def handle(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, signal.SIG_IGN if several else signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: processes().any(bool(asked))
        if processes().any(bool(asked)):
            raise KeyboardInterrupt
    finally:
        if not (several and asked):
            signal.signal(signal.SIGINT, previous)
