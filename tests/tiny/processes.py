"""Commands in a process of their own, or in several that meet as those of a launcher do (forks:
importing torch again would take long)."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ppcl_engine.__main__ import main

SECONDS = 120  # then a launch hangs
FAILED = 70  # exit code of a process that came to its end by an exception


class Launched:
    """The processes of one launch; `folder` takes what each of them prints."""

    def __init__(self, folder: Path, count: int, work: Callable[[], int]):
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"output_{rank}.txt" for rank in range(count)]
        self.launcher, port = _launcher()
        self.children = [self._start(rank, count, port, work) for rank in range(count)]

    def _start(self, rank: int, count: int, port: int, work: Callable[[], int]) -> int:
        child = os.fork()
        if child:
            return child
        code = FAILED
        try:
            with open(self.outputs[rank], "wb") as output:
                os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w") for fd in (1, 2))
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the launcher holds the store
            code = work()
        except BaseException:  # nothing of a child may come back into the tests
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def codes(self) -> list[int]:
        """Waits for all. Raises AssertionError, with all of them stopped, when that takes too
        long."""
        deadline, ended = time.monotonic() + SECONDS, {}
        while len(ended) < len(self.children):
            for child in set(self.children) - set(ended):
                there, status = os.waitpid(child, os.WNOHANG)
                if there:
                    ended[child] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                for child in {self.launcher, *self.children} - set(ended):
                    os.kill(child, signal.SIGKILL)
                raise AssertionError(
                    f"ended: {ended}; they said {[p.read_text()[-300:] for p in self.outputs]}"
                )
            time.sleep(0.01)
        os.kill(self.launcher, signal.SIGKILL)
        os.waitpid(self.launcher, 0)
        return [ended[child] for child in self.children]

    def lines(self, beginning: str = "ppcl:") -> list[str]:
        """The output of all of them."""
        texts = [line for output in self.outputs for line in output.read_text().splitlines()]
        return [line for line in texts if line.startswith(beginning)]


def forked(*arguments: object) -> int:
    """One command in a process of its own, and silent. Returns its pid."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            os._exit(main([str(argument) for argument in arguments]))
    return child


def exit_code(child: int) -> int:
    """Waits for a process of ours; the number of a signal that ended it is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(folder: Path, count: int, *arguments) -> Launched:
    return Launched(folder, count, lambda: main([str(argument) for argument in arguments]))


def _launcher() -> tuple[int, int]:
    """(process, port) of what holds the store through which processes meet. A store of our own
    would be forked with us, and a child that clears it away would wait for a thread that it does
    not have."""
    reading, writing = os.pipe()
    if child := os.fork():
        port = int(os.read(reading, 8))
        os.close(reading), os.close(writing)
        return child, port
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writing, str(store.port).encode())
    while True:
        time.sleep(SECONDS)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@torch.no_grad()
def relative(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    return float((tensor - expected).norm() / expected.norm().clamp_min(1e-12))
