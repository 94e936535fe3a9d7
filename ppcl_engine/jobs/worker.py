"""`python -m ppcl_engine.jobs.worker RUN_DIR`, or this file's path in the place of -m and the name.

Does what the folder's run.json says, tells of it in the folder's files (the contract: state.py),
and stops when it is asked to. Under `accelerate launch` every process runs the stages and the first
one tells. Exit codes: 0 done, 2 refused or failed by what a user can correct, 130 cancelled, 1
failed by an error of ours.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    from .attempt import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    # by its path, in any folder: the pack's root is found from here, and this folder hides nothing
    if not __package__:
        sys.path[0] = str(Path(__file__).resolve().parents[2])
        import ppcl_engine.jobs

        __package__ = ppcl_engine.jobs.__name__
    code = main()
    sys.stdout.flush(), sys.stderr.flush()
    # all is on disk; a tidy farewell of torch takes a second or two, and who cancels waits for it
    os._exit(code)
