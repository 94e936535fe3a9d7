"""One command in a process of its own: memory that it needed, bytes that it read and wrote, time.

    python -m benchmarks.full_size.process RESULT.json COMMAND ...

Memory is anonymous memory (what a mapped file takes can be given back at any time), sampled every
10 ms, above that of the loaded libraries. Bytes are those of the system calls, whether they come
from the disk or from the page cache.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path

INTERVAL = 0.01  # seconds between two looks


def number_in(path: str, field: str) -> int:
    line = next(row for row in Path(path).read_text().splitlines() if row.startswith(field + ":"))
    return int(line.split()[1])


def anonymous() -> int:
    return 1024 * number_in("/proc/self/status", "RssAnon")


class Watched:
    """What this process needs between `with` and its end."""

    def __enter__(self) -> Watched:
        self.start = time.perf_counter()
        self.floor = self.peak = anonymous()
        self.read, self.written = (number_in("/proc/self/io", f) for f in ("rchar", "wchar"))
        self.processor = _processor_seconds()
        self.ended = threading.Event()
        self.looking = threading.Thread(target=self._look, daemon=True)
        self.looking.start()
        return self

    def _look(self) -> None:
        while not self.ended.wait(INTERVAL):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.looking.join()

    def figures(self) -> dict:
        """Bytes and seconds. `own_reads`: of the looking itself, a few hundred bytes each, are in
        it."""
        return {
            "memory": self.peak - self.floor,
            "libraries": self.floor,
            "resident": 1024 * number_in("/proc/self/status", "VmHWM"),
            "read": number_in("/proc/self/io", "rchar") - self.read,
            "written": number_in("/proc/self/io", "wchar") - self.written,
            "seconds": round(time.perf_counter() - self.start, 1),
            "processor_seconds": round(_processor_seconds() - self.processor, 1),
        }


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def load_libraries() -> None:
    from diffusers import QwenImageTransformer2DModel  # noqa: F401

    from ppcl_engine import __main__, stages  # noqa: F401


def run(command: list[str]) -> int:
    if command[0] == "open_model":
        from ppcl_engine import open_model

        model = open_model(*command[1:2], streamed=True, base=command[2], variant="small")
        print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.3f} B parameters are in memory")
        return 0
    from ppcl_engine.__main__ import main

    return main(command)


def main(result: Path, command: list[str]) -> int:
    load_libraries()
    with Watched() as watched:
        code = run(command)
    result.write_text(json.dumps(watched.figures()))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
