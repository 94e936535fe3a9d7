"""Peak memory as the operating system counts it."""

import pytest
import torch

from ppcl_engine.system.machine import CLEAR, PeakMemory


@pytest.mark.skipif(not CLEAR.exists(), reason="the peak of a process is only told by Linux")
def test_peak_memory_sees_memory_that_is_free_again():
    memory = PeakMemory("cpu")
    torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.above_start() > 60 << 20
