"""The command `ppcl`, where Ctrl-C is one line from the first instruction on."""

from __future__ import annotations

from .system.early import watch


def main() -> int:
    """The command `ppcl`."""
    watch()
    from .__main__ import main as work

    return work()
