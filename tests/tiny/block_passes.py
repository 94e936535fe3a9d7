"""Counts what a training loop really runs, to compare with what it says it spent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from ppcl_engine.architectures.qwen_image import QwenImage


@contextmanager
def count_passes() -> Iterator[SimpleNamespace]:
    """`passes`: 1 for each block run without gradients, 3 for each that gradients will flow
    through."""
    counted, run_block = SimpleNamespace(passes=0), QwenImage.run_block

    def run(self, block, state):
        after = run_block(self, block, state)
        counted.passes += 3 if after.image.requires_grad else 1
        return after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QwenImage, "run_block", run)
        yield counted
