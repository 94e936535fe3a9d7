"""Peak memory as the operating system counts it, and as a GPU's allocator does."""

import pytest
import torch

from ppcl_engine.system.machine import CLEAR, PeakMemory, device_memory, resolve_device


@pytest.mark.skipif(not CLEAR.exists(), reason="the peak of a process is only told by Linux")
def test_peak_memory_sees_memory_that_is_free_again():
    memory = PeakMemory("cpu")
    torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.above_start() > 60 << 20


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_is_exact():
    kept = torch.ones(1 << 20, dtype=torch.uint8, device="cuda")
    memory = PeakMemory("cuda")
    torch.ones(64 << 20, dtype=torch.uint8, device="cuda")
    torch.ones(32 << 20, dtype=torch.uint8, device="cuda")
    assert memory.above_start() == 64 << 20 < device_memory("cuda") and kept.is_cuda


@pytest.mark.gpu
def test_memory_of_another_gpu_does_not_count():
    last = f"cuda:{torch.cuda.device_count() - 1}"
    if last == "cuda:0":
        pytest.skip("needs two GPUs")
    memory = PeakMemory(last)
    torch.ones(64 << 20, dtype=torch.uint8, device="cuda:0")
    assert memory.above_start() == 0


@pytest.mark.gpu
def test_a_gpu_is_taken_where_there_is_one():
    last = f"cuda:{torch.cuda.device_count() - 1}"
    assert (resolve_device("auto"), resolve_device(last)) == ("cuda", last)
