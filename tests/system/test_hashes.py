"""Hashes of tensors."""

from __future__ import annotations

import os
import signal

import torch

from ppcl_engine.system.tensor_files import TensorFile, write_tensors


def test_a_forked_process_writes_large_tensors_too(tmp_path):
    """A thread that its parent started for them would not be there."""
    large = {"a": torch.zeros(64 << 20, dtype=torch.uint8)}
    write_tensors(tmp_path / "parent.safetensors", large, {})
    child = os.fork()
    if not child:
        signal.alarm(20)  # rather than wait for ever
        write_tensors(tmp_path / "child.safetensors", large, {})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(TensorFile(tmp_path / "child.safetensors").read("a"), large["a"])
