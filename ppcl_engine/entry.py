"""The command `ppcl`. Ctrl-C ends it in one line from its first instruction on."""

from __future__ import annotations

from .system.early import finish, start


def main() -> int:
    """The exit code."""
    start()
    from .__main__ import main as work

    return finish(work())
