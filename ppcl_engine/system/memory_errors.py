"""How a lack of memory shows in an exception."""

from __future__ import annotations

import errno

NO_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't start new thread",
)
"""what the RuntimeErrors of several libraries say when memory runs out"""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether Python, the operating system or a library reports that memory has run out."""
    from_library = isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
    from_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return from_library or from_system or isinstance(error, MemoryError)
