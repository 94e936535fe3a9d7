"""An exception that ended a job, as one line that says what to do."""

from __future__ import annotations

import errno
import os
import sys

from ..estimate.advice import memory_advice
from ..settings.convert_settings import JobConfig
from ..system.memory_errors import is_lack_of_memory

DONE, UNEXPECTED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def failure(error: BaseException, stage: str, config: JobConfig) -> tuple[str, int]:
    """(line, exit code)"""
    if line := memory_line(error, stage, config):
        return line, USER_ERROR
    if isinstance(error, ImportError):
        return _one_line(
            f"{error}; install requirements.txt into this Python ({sys.executable})"
        ), USER_ERROR
    if isinstance(error, ValueError):
        return _one_line(str(error)), USER_ERROR
    if isinstance(error, OSError) and error.errno is not None:
        return _file_line(error, error.errno), USER_ERROR
    return _one_line(f"{type(error).__name__}: {error}"), UNEXPECTED


def memory_line(error: BaseException, stage: str, config: JobConfig) -> str | None:
    """None unless the error is a lack of memory."""
    if not is_lack_of_memory(error):
        return None
    return f"{stage} ran out of memory on {config.device}: {memory_advice(config)}; then start it again, it goes on"


def _file_line(error: OSError, code: int) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if code in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{where}the disk is full; free space and start it again, it goes on from what is saved"
        )
    return f"{where}{os.strerror(code)}; correct it and start it again"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
