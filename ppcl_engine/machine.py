"""What this machine has: memory of a device, free disk, speed."""

from __future__ import annotations

import shutil
import time
from functools import cache
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup/memory.max")  # of a container


def device_memory(device: str) -> int:
    """Bytes in all, whoever has them now."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    limit = CGROUP.read_text().strip() if CGROUP.exists() else ""
    return min(psutil.virtual_memory().total, int(limit) if limit.isdigit() else 1 << 62)


def free_disk(folder: Path) -> int:
    """Bytes where the folder is or will be."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@cache
def flops_a_second(device: str, dtype: torch.dtype) -> float:
    """Of one large matrix product, measured; real blocks reach about this on large inputs."""
    size = 1536 if device == "cpu" else 8192
    size = size // 4 if dtype is torch.float64 else size  # in which many GPUs are slow
    a = torch.ones(size, size, device=device, dtype=dtype)
    a @ a
    start, count = time.perf_counter(), 3
    for _ in range(count):
        b = a @ a
    float(b[0, 0])
    return count * 2 * size**3 / (time.perf_counter() - start)
