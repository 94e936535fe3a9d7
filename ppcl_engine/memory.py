"""Peak memory of a piece of work, as the device or the operating system counts it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


class PeakMemory:
    """Bytes that were needed above what was held when it was made. On a CPU only Linux tells."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        elif CLEAR.exists():
            return_freed_memory()  # what the allocator keeps would hide what comes
            CLEAR.write_text(RESET_PEAK)
            self.start = _status("VmRSS")

    def above_start(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.start
        return _status("VmHWM") - self.start if CLEAR.exists() else None


def return_freed_memory() -> None:
    """Gives the pages that glibc keeps after `free` back to the operating system; other libraries do it by themselves."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
