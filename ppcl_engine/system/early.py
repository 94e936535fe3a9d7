"""What has to be done before libraries are imported: Ctrl-C is one line and exit code 130 from our
first instruction on, threads learn how to wait, and output how to write any letter.

Imports only the smallest parts of the standard library, so that almost nothing runs before it.
"""

import os
import signal
import sys

INTERRUPTED = 130
LINE = b"\nppcl: stopped before it began; nothing was written\n"
# as torchrun and MPI implementations name them
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def start() -> None:
    watch()
    settle()


def settle() -> None:
    """The same without Ctrl-C, for a process that is told to stop in another way."""
    wait_passively()
    print_any_letter()


def watch() -> None:
    """Ctrl-C ends the process at once, until `begin`.

    An exception could be raised in the middle of a library's import, which is not prepared for one.
    Where Ctrl-C is turned off, as behind `nohup ... &`, it stays off.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def wait_passively() -> None:
    """Threads of OpenMP sleep while they wait for each other, unless the environment says otherwise.

    Threads that spin keep processors from what they wait for: on two cores beside twelve other
    processes, probing the demo's teacher took 180 to 210 seconds, and 33 to 37 like this.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def print_any_letter() -> None:
    """Consoles and log files of Windows know few letters: the others are written as codes."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # there may be none, or one of a host's
        if reconfigure:
            reconfigure(errors="backslashreplace")


def begin() -> None:
    """Work starts, and must be saved: from now on Ctrl-C raises KeyboardInterrupt, as in any
    program."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def finish(code: int) -> int:
    """The exit code, when everything is done and said. Ctrl-C while Python ends no longer changes it.

    After an interrupt the process ends here: Python would repeat the signal when it ends, so that
    the exit code were -2, if the interrupt came inside of code that a library makes from text.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code == INTERRUPTED:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    return code


def _end(number, frame) -> None:
    if all(os.environ.get(name, "0") == "0" for name in RANKS):
        os.write(2, LINE)
    os._exit(INTERRUPTED)
