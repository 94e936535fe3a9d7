"""What stands where a block was dropped, so that every other block keeps the teacher's number.

This is what keeps a ControlNet's depth right: its residual for the teacher's block u reaches block u,
and so do LoRA names and patches of blocks.
"""

from __future__ import annotations

from ...ppcl_engine.models.surgery import PassThrough
from .base import BlockList


class Skip(PassThrough):
    """Stands where a block was dropped, and passes the streams on."""

    def __init__(self, blocks: BlockList):
        super().__init__(blocks.reads, blocks.gives)


class NoRoute:
    """Stands for the forward of a block that a variant leaves out."""

    def __init__(self, blocks: BlockList):
        self.skip = Skip(blocks)

    def __call__(self, *arguments, **named):
        return self.skip(*arguments, **named)
