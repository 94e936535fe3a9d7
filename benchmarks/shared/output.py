"""What every benchmark shares: its options, the table it prints, the result file it writes."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

from ppcl_engine.system.atomic import write_json

RESULTS = Path(__file__).parents[1] / "results"
# a quick run proves that the script works, nothing else
QUICK_RESULTS = Path("runs/benchmarks_quick")
PACKAGES = ("torch", "diffusers", "safetensors", "numpy")


def options(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=description.splitlines()[0]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smallest sizes, to see that it runs; figures mean nothing",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder of {name}.json (default {RESULTS.parent.name}/{RESULTS.name})",
    )
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options, with `command` as it can be typed again and `output` filled in."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(arguments)
    chosen.command = shlex.join([*parser.prog.split(), *arguments])
    chosen.output = chosen.output or (QUICK_RESULTS if chosen.quick else RESULTS)
    return chosen


def write(name: str, chosen: argparse.Namespace, values: dict) -> Path:
    """`<output>/<name>.json`: the values, then the machine, versions and command they come from."""
    path = chosen.output / f"{name}.json"
    about = {
        "quick": chosen.quick,
        "command": chosen.command,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(path, {**values, **about})
    print(f"\nwrote {path}")
    return path


def machine() -> dict:
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }


def versions() -> dict:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def print_table(title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """First column left, the others right."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    print(f"\n{title}")
    for first, *others in lines:
        print(
            "  ".join(
                [
                    first.ljust(widths[0]),
                    *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True)),
                ]
            )
        )


def _processor() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
