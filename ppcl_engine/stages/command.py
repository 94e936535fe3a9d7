"""A command's work, once it has been read: an error or an interrupt ends it in one line and an exit
code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from ..system.distributed import leave, tell
from ..system.early import INTERRUPTED
from ..system.interruption import Stopped
from ..system.memory_errors import is_lack_of_memory
from ..system.progress import Progress
from ..system.user_errors import USER_ERROR, drop_output, line_of
from ..system.wording import one_line

MEMORY_ADVICE = "use --streamed, a smaller batch or smaller pictures, or see --dry-run"


def code_of(work: Callable[[], None], arguments: Sequence[str]) -> int:
    """Does the work and returns the exit code. `arguments`: the command line, whose long values are
    cut in messages."""
    return leave(_code_of(work, arguments))


def _code_of(work: Callable[[], None], arguments: Sequence[str]) -> int:
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has read enough
        drop_output()
        return 0
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        Progress.close_all()
        tell(f"ppcl: {arguments[0]} ran out of memory; {MEMORY_ADVICE}")
        return USER_ERROR
    except (Stopped, KeyboardInterrupt, ValueError, OSError) as error:
        Progress.close_all()
        tell(f"ppcl: {one_line(line_of(error), arguments)}")
        return INTERRUPTED if isinstance(error, Stopped | KeyboardInterrupt) else USER_ERROR
    return 0
