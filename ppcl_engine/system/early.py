"""Ctrl-C while Python still reads its libraries: one line and exit code 130, from our first
instruction on.

Only the standard library's smallest parts are imported here, so that there is next to nothing
before it.
"""

import os
import signal

INTERRUPTED = 130
LINE = b"\nppcl: stopped before it began; nothing was written\n"
# as torchrun and MPIs name them
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def watch() -> None:
    """Ctrl-C ends the process at once, until `begin`. An exception could come up in the midst of a
    library's import. Where Ctrl-C is turned off, as behind `nohup ... &`,
    it stays off."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def begin() -> None:
    """Work starts, which has to save: from now on Ctrl-C raises KeyboardInterrupt, as it does in
    any program."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number, frame) -> None:
    if all(os.environ.get(name, "0") == "0" for name in RANKS):
        os.write(2, LINE)
    os._exit(INTERRUPTED)
