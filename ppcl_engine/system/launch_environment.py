"""What the environment says of the launch that this process belongs to. Standard library only."""

from __future__ import annotations

import os

from .early import RANKS

# as torchrun and MPI implementations name them
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched() -> bool:
    """Whether this is one of several processes. Raises ValueError where several were asked for and
    one was started."""
    if several():
        return True
    if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ:
        raise ValueError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; write --multi_gpu in place "
            "of --cpu (without a GPU it means processes on the CPU)"
        )
    return False


def is_main() -> bool:
    """Whether this process is the main one of its launch, or alone; known before the processes have
    met."""
    return not any(environment_number(name, 0) for name in RANKS) or not several()


def several() -> bool:
    return launched_together() > 1


def launched_together() -> int:
    """How many processes the launch has; known before they have met."""
    return max(environment_number(name, 1) for name in SIZES)


def environment_number(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)
