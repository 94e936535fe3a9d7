"""Several processes in one training, as `accelerate launch` or torchrun start them.

data: each takes its rows of every batch; loss, gradients and normal equations are summed over the
processes. shard: the same, and each holds its part of what is trained (`sharded_walk.py`). intervals:
each trains intervals of its own; they exchange nothing but files. One process: every function here
returns its input, and accelerate is not imported.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from .launch_environment import environment_number, is_main, launched, several

# a stage may take days; a process that dies is noticed by its closed connection, not by a timeout
PATIENCE = timedelta(days=30)
GLANCE = 0.005  # seconds between two looks of a waiting process, so that it reacts to Ctrl-C
GRID_INPUT = "grid"  # the one input that has no row for each sample

Config = TypeVar("Config")
Result = TypeVar("Result")
Item = TypeVar("Item")


class Lost(ValueError):
    """Another process has ended unexpectedly."""


@dataclass(frozen=True)
class Processes:
    """This process, and what it shares with the others."""

    rank: int = 0
    """this process's number, from 0"""
    count: int = 1
    """number of processes"""
    share: str = ""
    """ "data", "shard", "intervals", or "" for nothing"""
    gpu: str = "cuda"
    """the GPU of this process"""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def by_rows(self) -> bool:
        return self.count > 1 and self.share in ("data", "shard")

    @property
    def shards(self) -> bool:
        """Whether it holds only its part of what is trained."""
        return self.count > 1 and self.share == "shard"

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of what it trains."""
        return self.is_main or not self.by_rows

    def own(self, items: Sequence[Item]) -> Sequence[Item]:
        """The intervals, fits or blocks that this process trains."""
        return items[self.rank :: self.count] if self.share == "intervals" else items

    def rows(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's rows of a batch."""
        if not self.by_rows:
            return inputs
        return {
            n: t if n == GRID_INPUT else t.tensor_split(self.count)[self.rank]
            for n, t in inputs.items()
        }

    def folder(self, path: Path) -> Path:
        """A folder beside `path` that only this process writes and reads."""
        return path.with_name(f"{path.name}_process_{self.rank}") if self.count > 1 else path

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes that share a batch; no gradient flows back through it."""
        if not self.by_rows:
            return tensor
        from accelerate.utils import reduce

        return cast("torch.Tensor", reduce(tensor.detach(), "sum"))

    def any(self, flag: bool) -> bool:
        """Whether it is true in any of the processes that share a batch."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.by_rows else flag

    def sum_gradients(self, parameters: Iterable[torch.Tensor], loss: torch.Tensor) -> torch.Tensor:
        """Puts into every `grad` the sum over the processes that share a batch; returns the sum of
        their losses."""
        if not self.by_rows:
            return loss.detach()
        gradients = [p.grad for p in parameters if p.grad is not None]
        for matrix in (gradient for gradient in gradients if gradient.ndim > 1):
            matrix.copy_(self.sum(matrix))
        # there are many vectors, and they are small: one exchange for all
        vectors = [loss.detach().clone(), *(g for g in gradients if g.ndim < 2)]
        vector_to_parameters(self.sum(parameters_to_vector(vectors)), vectors)
        return vectors[0]

    def wait(self) -> None:
        """Returns when all processes have called it."""
        if self.count > 1:
            work = torch.distributed.all_reduce(torch.zeros(1), async_op=True)
            while work is not None and not work.is_completed():
                time.sleep(GLANCE)
            if work is not None:
                work.wait()


ALONE = Processes()
_CURRENT: ContextVar[Processes] = ContextVar("processes", default=ALONE)


def processes() -> Processes:
    """This process, and what it shares at the moment."""
    return _CURRENT.get()


@contextmanager
def alone() -> Iterator[None]:
    """For work that one process does by itself during shared work, such as drawing a picture."""
    with _working(Processes(gpu=processes().gpu)):
        yield


def together(work: Callable[[Config], Result], config: Config, share: str = "") -> Result | None:
    """work(config), shared. With nothing to share the main process does it while the others wait
    and get None."""
    if not launched():
        return work(config)
    everyone, result = _everyone(getattr(config, "device", "auto") == "cpu"), None
    shared = replace(everyone, share=share) if share else Processes(gpu=everyone.gpu)
    with _exchanging():
        if share or everyone.is_main:
            with _working(shared):
                result = work(config)
        everyone.wait()
    return result if everyone.is_main else None


def tell(line: str) -> None:
    """To stderr; once, where several processes say the same."""
    if _is_first_to_say(line):
        print(line, file=sys.stderr, flush=True)


def leave(code: int) -> int:
    """Closes the connections and returns the exit code. After a failure it ends the process.

    The others may be waiting in a sum, and then neither they nor this process could shut down in an
    orderly way.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if code:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        torch.distributed.destroy_process_group()
    return code


@contextmanager
def _working(current: Processes) -> Iterator[Processes]:
    token = _CURRENT.set(current)
    try:
        yield current
    finally:
        _CURRENT.reset(token)


@cache
def _everyone(cpu: bool) -> Processes:
    """Connects to the others: NCCL between GPUs; gloo for tensors in memory, and for everything
    where processes share a GPU."""
    from accelerate import PartialState

    gpus = 0 if cpu else torch.cuda.device_count()
    backend = "cuda:nccl,cpu:gloo" if gpus >= environment_number("LOCAL_WORLD_SIZE", 1) else "gloo"
    state = PartialState(cpu=not gpus, backend=backend, timeout=PATIENCE)
    if state.num_processes == 1:
        raise ValueError(
            "several processes were started, but they could not connect to each other; use accelerate launch or torchrun"
        )
    gpu = f"cuda:{state.local_process_index % gpus}" if gpus else "cuda"
    return Processes(state.process_index, state.num_processes, gpu=gpu)


def _is_first_to_say(line: str) -> bool:
    """The store through which the processes met counts who said it; before they meet, only the main
    one speaks."""
    if not (several() and torch.distributed.is_initialized()):
        return is_main()
    try:
        return torch.distributed.distributed_c10d._get_default_store().add(line, 1) == 1
    except RuntimeError:  # it was lost with the process that held it
        return True


@contextmanager
def _exchanging() -> Iterator[None]:
    """Raises Lost where the processes exchange something inside, and one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no type of error of its own; its texts name the file of its source
        lost = isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)
        if not lost:
            raise
        reason = str(error).splitlines()[0].split(". ")[0]
        raise Lost(
            f"another process has ended, so this one ends too; what was saved is kept ({reason})"
        ) from error
