"""What this machine has: devices, precisions, memory and its peak, free disk space, speed."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import time
from functools import cache
from pathlib import Path

import psutil
import torch

from .distributed import processes
from .wording import DEVICE_FORM, DEVICES, shown

CGROUP = Path("/sys/fs/cgroup/memory.max")  # of a container
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
PRODUCTS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device_memory(device: str) -> int:
    """Bytes in total, whoever uses them."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    limit = CGROUP.read_text().strip() if CGROUP.exists() else ""
    return min(psutil.virtual_memory().total, int(limit) if limit.isdigit() else 1 << 62)


def free_memory(device: str = "cpu") -> int:
    """Bytes that are free, by default of the host."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    used_here, free = CGROUP.with_name("memory.current"), psutil.virtual_memory().available
    limit = CGROUP.read_text().strip() if CGROUP.exists() else ""
    return min(free, int(limit) - int(used_here.read_text())) if limit.isdigit() else free


def free_disk(folder: Path) -> int:
    """Free bytes where the folder is, or will be."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@cache
def flops_a_second(device: str, dtype: torch.dtype) -> float:
    """Measured on large matrix products; real blocks with large inputs reach about this. The fastest
    one counts: the others waited for something else on this machine."""
    size = 1024 if device == "cpu" else 8192
    size = size // 2 if dtype is torch.float64 else size  # many GPUs are slow in it
    a = torch.ones(size, size, device=device, dtype=dtype)
    a @ a
    seconds = []
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


class PeakMemory:
    """Bytes that were needed at most above those in use when it was made. On a CPU only Linux can
    tell."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        elif CLEAR.exists():
            return_freed_memory()  # memory that the allocator keeps would hide what is needed next
            CLEAR.write_text(RESET_PEAK)
            self.start = _status("VmRSS")

    def above_start(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.start
        return _status("VmHWM") - self.start if CLEAR.exists() else None


def return_freed_memory() -> None:
    """Gives the pages that glibc keeps after `free` back to the operating system; other C libraries
    do so by themselves."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def resolve_device(device: str) -> str:
    """Raises ValueError for a device that this machine does not have, and for a name that is not a
    device."""
    if not re.fullmatch(DEVICE_FORM, device):
        raise ValueError(f"--device {shown(device)}: choose {DEVICES}")
    if device == "auto":
        return processes().gpu if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device} is not on this machine; use --device cpu")
    if (
        device.startswith("cuda:")
        and int(device.removeprefix("cuda:")) >= torch.cuda.device_count()
    ):
        last = torch.cuda.device_count() - 1
        raise ValueError(
            f"device {device} is not on this machine; its GPUs are cuda:0 to cuda:{last}"
        )
    if device.startswith("cuda:") and processes().count > 1:
        raise ValueError(
            f"device {device} would be shared by {processes().count} processes; use --device cuda, which gives each its own"
        )
    return processes().gpu if device == "cuda" else device
