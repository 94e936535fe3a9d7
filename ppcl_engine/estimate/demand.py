"""What a stage takes, whichever machine runs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one process takes; bytes read and written are counted in `traffic.py`."""

    certain: float
    """bytes of the device: weights, optimiser, states that are kept"""
    likely: float
    """bytes beside those: what a backward keeps, a cache of states in memory"""
    host: float = 0
    """bytes in the host's memory that are certain; where it computes itself, `certain` has them too"""
    disk: float = 0
    """bytes of new files that are certain"""
    flops: float = 0
