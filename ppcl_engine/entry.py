"""The command `ppcl`. Ctrl-C ends it in one line from its first instruction on."""

from __future__ import annotations

from .system.early import finish, wait_passively, watch


def main() -> int:
    """The exit code."""
    watch()
    wait_passively()
    from .__main__ import main as work

    return finish(work())
