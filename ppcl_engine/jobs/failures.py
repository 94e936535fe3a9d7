"""What ended a job, in one line that says what to do."""

from __future__ import annotations

import errno
import os
import sys

from ..estimate.advice import memory_advice
from ..settings.base_settings import Common

DONE, UNEXPECTED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
NO_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't start new thread",
)
"""How libraries say it in a RuntimeError."""


def failure(error: BaseException, stage: str, config: Common | None) -> tuple[str, int]:
    """(line, exit code)"""
    if config is not None and (line := memory_line(error, stage, config)):
        return line, USER_ERROR
    if isinstance(error, ImportError):
        return _one_line(
            f"{error}; install requirements.txt into this Python ({sys.executable})"
        ), USER_ERROR
    if isinstance(error, ValueError):
        return _one_line(str(error)), USER_ERROR
    if isinstance(error, OSError) and error.errno is not None:
        return _file_line(error), USER_ERROR
    return _one_line(f"{type(error).__name__}: {error}"), UNEXPECTED


def memory_line(error: BaseException, stage: str, config: Common) -> str | None:
    """None when the error is another one than a lack of memory."""
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (told or refused or isinstance(error, MemoryError)):
        return None
    return f"{stage} ran out of memory on {config.device}: {memory_advice(config)}; then start it again, it goes on"


def _file_line(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{where}the disk is full; free space and start it again, it goes on from what is saved"
        )
    return f"{where}{os.strerror(error.errno)}; correct it and start it again"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
