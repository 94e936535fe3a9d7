"""`python -m ppcl_engine.jobs.worker RUN_DIR`, or `python` and the path of this file.

Runs the stages that the folder's run.json names, reports on them in the folder's files (the contract
is in state.py), and stops when it is asked to. Under `accelerate launch` every process runs the
stages and the first one reports. Exit codes: 0 done; 2 refused, or failed for a reason that the user
can correct; 130 cancelled; 1 failed for any other reason.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    from ..system.early import settle

    settle()  # before torch is imported
    from .attempt import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    # run by its path: imports start at the pack's root, and not in this folder, whose module names
    # would hide others
    if not __package__:
        sys.path[0] = str(Path(__file__).resolve().parents[2])
        import ppcl_engine.jobs

        __package__ = ppcl_engine.jobs.__name__
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # everything is on disk; torch takes a second or two to shut down, and whoever cancels waits for it
    os._exit(code)
