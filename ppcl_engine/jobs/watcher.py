"""Hears from outside that a job should stop, and stops it as Ctrl-C does: every stage knows how to
end then."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from pathlib import Path

from .reporter import Reporter
from .state import cancel_asked, is_alive

EVERY = 0.1  # seconds
PARENT_EVERY = 5  # looks


class Watcher:
    """A thread that interrupts the main one, once; `reason`: why, and "" before. It also keeps the
    state on disk fresh.

    parent: (pid, when it started) of the process that the job must not outlive.
    """

    def __init__(self, folder: Path, parent: tuple[int, float] | None):
        self.folder, self.parent, self.reason = folder, parent, ""
        self.reporter: Reporter | None = None
        self._terminated, self._ended = False, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watcher")

    def start(self) -> None:
        """From now on SIGTERM asks to stop too, and an interrupt comes through where the shell had
        turned it off."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, self._terminate)
        self._thread.start()

    def stop(self) -> None:
        """No interrupt comes after this, nor does one that is on its way."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._ended.set()
        self._thread.join()

    def asked(self) -> bool:
        return bool(self.reason)

    def _terminate(self, number, frame) -> None:
        self._terminated = True

    def _watch(self) -> None:
        looks = 0
        while not self._ended.wait(EVERY):
            looks += 1
            if not self.reason and (reason := self._reason(looks % PARENT_EVERY == 0)):
                self.reason = reason
                _thread.interrupt_main()
                if self.reporter is not None:
                    self.reporter.stopping(reason)
            if self.reporter is not None:
                # a full disk: the stage says so, and the next look tries again
                with contextlib.suppress(OSError):
                    self.reporter.write()

    def _reason(self, look_at_parent: bool) -> str:
        if cancel_asked(self.folder):
            return "cancelled"
        if self._terminated:
            return "cancelled by a signal (SIGTERM)"
        if look_at_parent and self.parent is not None and not is_alive(*self.parent):
            return "cancelled, since the process that started it has ended"
        return ""
