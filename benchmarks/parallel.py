"""distill-depth in 1, 2 and 4 processes on one machine: seconds, and how far the students are from
one process's.

data: the processes share the rows of every batch. intervals: each has intervals of its own. Each
process computes with one thread; several are started by `accelerate launch` and meet through gloo.
The time of a command that finds everything done (imports, the launcher, opening the teacher) is
measured and taken off.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ppcl_engine.data.calibration import save_calibration
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import PruningPlan, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.system.atomic import write_text
from ppcl_engine.system.tensor_files import TensorFile

from .shared import output
from .shared.teachers import BUNDLED, describe, rendered

INTERVALS = "2-4 6-8 10-12 14-16 18-20"
ROOT = Path(__file__).parents[1]
MODES = ("data", "intervals")


def new_run(folder: Path, chosen) -> Run:
    """Calibrated and planned."""
    run, weights = Run(folder), Weights(chosen.teacher)
    save_calibration(
        run.calibration, rendered(chosen.teacher, weights, 4 * chosen.batch, chosen.batch, seed=0)
    )
    plan = PruningPlan(
        architecture=weights.architecture.name,
        config=weights.config,
        num_blocks=weights.num_blocks,
        fingerprint=weights.fingerprint,
        intervals=parse_intervals(chosen.intervals),
    )
    write_text(run.plan, plan.to_json())
    return run


def launcher(count: int) -> list[str]:
    """Arguments of python in front of a module's name: for several processes, accelerate's."""
    if count == 1:
        return ["-m"]
    return [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(count),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(free_port()),
        "-m",
    ]


def command(chosen, run: Run, count: int, mode: str) -> list[str]:
    settings = {
        "model": chosen.teacher,
        "run": run.folder,
        "parallel": mode,
        "rounds": chosen.rounds,
        "updates": chosen.updates,
        "learning-rate": 1e-3,
        "device": "cpu",
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [sys.executable, *launcher(count), "ppcl_engine", "distill-depth", *options]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def seconds(arguments: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - begun


def timed(chosen, folder: Path, count: int, mode: str) -> dict:
    run = new_run(folder, chosen)
    arguments = command(chosen, run, count, mode)
    whole, start = seconds(arguments), seconds(arguments)
    return {"processes": count, "mode": mode, "seconds": whole - start, "start_seconds": start}


def farthest(run: Run, alone: Run) -> float:
    """Largest relative difference of a student's tensor."""
    found = [0.0]
    for path in alone.students.iterdir():
        pair = [TensorFile(folder / path.name) for folder in (run.students, alone.students)]
        for name in (n for n in pair[1].keys() if n.startswith("weight.")):
            ours, theirs = (file.read(name) for file in pair)
            found.append(float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)))
    return max(found)


def measure(chosen, folder: Path) -> list[dict]:
    """Modes and numbers in turn, `repeats` times; the fastest of each counts, as only other work
    makes one slower."""
    cases = [(1, "data")] + [(count, mode) for count in chosen.processes for mode in MODES]
    rows: dict[tuple[int, str], dict] = {}
    for repeat in range(chosen.repeats):
        for count, mode in cases:
            place = folder / f"{count}_{mode}_{repeat}"
            row = timed(chosen, place, count, mode)
            print(f"{count} {mode}: {row['seconds']:.1f} s", flush=True)
            row["largest_difference"] = farthest(Run(place), Run(folder / f"1_data_{repeat}"))
            rows[count, mode] = min(row, rows.get((count, mode), row), key=lambda r: r["seconds"])
    alone = rows[cases[0]]["seconds"]
    return [{**row, "ratio": row["seconds"] / alone} for row in rows.values()]


def show(rows: list[dict]) -> None:
    lines = [
        [
            f"{r['processes']}, {r['mode']}" if r["processes"] > 1 else "1",
            f"{r['seconds']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['largest_difference']:.1e}",
            f"{r['start_seconds']:.1f}",
        ]
        for r in rows
    ]
    output.print_table(
        "distill-depth", ["processes", "seconds", "ratio", "difference", "start, s"], lines
    )


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("parallel", __doc__)
    parser.add_argument("--teacher", type=Path, default=BUNDLED)
    parser.add_argument("--intervals", default=INTERVALS)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rounds", type=int, help="rounds of the training (3)")
    parser.add_argument("--updates", type=int, help="updates of an interval in a round (40)")
    parser.add_argument("--processes", type=int, nargs="*", help="besides one (2 4)")
    parser.add_argument("--repeats", type=int, help="all cases in turn (3)")
    chosen = output.parse(parser, arguments)
    full = {"rounds": 3, "updates": 40, "processes": [2, 4], "repeats": 3}
    quick = {"rounds": 1, "updates": 4, "processes": [2], "repeats": 1}
    for name, value in (quick if chosen.quick else full).items():
        setattr(chosen, name, value if getattr(chosen, name) is None else getattr(chosen, name))
    with tempfile.TemporaryDirectory(prefix="ppcl_parallel_") as name:
        rows = measure(chosen, Path(name))
    show(rows)
    names = ("intervals", "batch", "rounds", "updates", "repeats")
    about = {name: getattr(chosen, name) for name in names} | {"threads_a_process": 1}
    values = {
        "rows": rows,
        "teacher": describe(chosen.teacher, Weights(chosen.teacher)),
        "settings": about,
    }
    return output.write("parallel", chosen, values)


if __name__ == "__main__":
    main()
