"""The GPU that is measured, and how: events around the work, the allocator's peak. Its quick form
measures the CPU."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from ppcl_engine.system.machine import device_memory

GB = 1e9
ROOM = 4 * GB
"""beside the weights: activations of one picture, the libraries' own"""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A device as torch names it."""

    device: str
    """ "cuda", "cuda:1", "cpu" """
    name: str
    """as its driver gives it"""
    memory: int
    """bytes in total"""

    @classmethod
    def of(cls, device: str) -> Card:
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
        return cls(device=device, name=name, memory=device_memory(device))

    @property
    def folder_name(self) -> str:
        return slug(f"{self.name} torch {torch.__version__}")

    def storage(self, parameters: int) -> str:
        """How a model of so many parameters is stored: bf16 where it fits, else fp8."""
        return "bfloat16" if 2 * parameters + ROOM < self.memory else "float8"

    def seconds(self, work: Callable[[], object]) -> float:
        """How long one call takes, until the device is done."""
        if not self.device.startswith("cuda"):
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def timed(self, work: Callable[[], object], warm_up: int, repeats: int) -> dict:
        """The median of several calls, and the fastest and slowest of them."""
        for _ in range(warm_up):
            work()
        seconds = [self.seconds(work) for _ in range(repeats)]
        return {"seconds": median(seconds), "fastest": min(seconds), "slowest": max(seconds)}

    def settle(self) -> None:
        """Waits for what is queued on a GPU, and gives back what was freed."""
        if self.device.startswith("cuda"):
            gc.collect()
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


def slug(text: str) -> str:
    """The text as the name of a file."""
    return re.sub("[^a-z0-9]+", "_", text.lower())


def too_large(card: Card) -> dict:
    """The row of what ran out of memory."""
    return {"cut": f"more memory than this card's {card.memory / GB:.1f} GB"}
