"""The rows of all seeds, trained by several processes side by side: each runs this benchmark for one row,
in the same folder, and leaves its row.json there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def train_rows(
    jobs: Sequence[tuple[int, str]], arguments: Sequence[str], folder: Path, processes: int
) -> None:
    """jobs: (seed, folder of the row); arguments: of every process; what each prints goes to
    folder/log. Raises RuntimeError, after all have ended, naming the log of one that failed."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    logs = folder / "log"
    logs.mkdir(parents=True, exist_ok=True)

    def train(job: tuple[int, str]) -> Path | None:
        """The log, where it failed."""
        seed, row = job
        path = logs / f"seed_{seed}_{row}.txt"
        which = ("--only", row, "--only-seed", str(seed))
        command = [sys.executable, "-m", "benchmarks.ablation", *arguments, *which]
        with open(path, "w", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        print(
            f"seed {seed}, {row}: {'done' if not done.returncode else f'failed, see {path}'}",
            flush=True,
        )
        return path if done.returncode else None

    with ThreadPoolExecutor(processes) as pool:
        failed = [path for path in pool.map(train, jobs) if path]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(jobs)} rows failed; the first one's output is in {failed[0]}"
        )
