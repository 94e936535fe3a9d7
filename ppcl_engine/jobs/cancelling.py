"""Hears that a job should stop, and stops it as Ctrl-C does, which every stage handles."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from pathlib import Path

from .reporter import Reporter
from .state import cancel_asked, is_alive

EVERY = 0.1  # seconds between two checks
PARENT_EVERY = 5  # checks between two of the parent


class CancelListener:
    """A thread that hears Cancel (its file, SIGTERM, the end of the parent) and interrupts the main
    thread, once. It also writes the reporter's state to disk."""

    def __init__(self, folder: Path, parent: tuple[int, float] | None):
        self.folder = folder
        self.parent = parent
        """(pid, start time) of the process that the job must not outlive"""
        self.reason = ""
        """why the job should stop; "" while it should not"""
        self.reporter: Reporter | None = None
        self._terminated, self._ended = False, threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="cancel listener")

    def start(self) -> None:
        """Starts listening. SIGTERM now asks the job to stop too, and Ctrl-C works even if the shell had
        turned it off."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, self._terminate)
        self._thread.start()

    def stop(self) -> None:
        """Stops listening. No interrupt arrives afterwards, not even one that was already sent."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._ended.set()
        self._thread.join()

    def asked(self) -> bool:
        return bool(self.reason)

    def _terminate(self, number, frame) -> None:
        self._terminated = True

    def _listen(self) -> None:
        checks = 0
        while not self._ended.wait(EVERY):
            checks += 1
            if not self.reason and (reason := self._reason(checks % PARENT_EVERY == 0)):
                self.reason = reason
                _thread.interrupt_main()
                if self.reporter is not None:
                    self.reporter.stopping(reason)
            if self.reporter is not None:
                # a full disk: the stage will fail with that error, and the next check tries again
                with contextlib.suppress(OSError):
                    self.reporter.write()

    def _reason(self, check_parent: bool) -> str:
        if cancel_asked(self.folder):
            return "cancelled"
        if self._terminated:
            return "cancelled by a signal (SIGTERM)"
        if check_parent and self.parent is not None and not is_alive(*self.parent):
            return "cancelled, since the process that started it has ended"
        return ""
