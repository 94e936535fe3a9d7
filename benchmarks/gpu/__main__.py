"""Time and memory of everything here that wants a GPU, on whichever one is there: one command, one table.

Weights are random, of the published size. Each part takes 8 minutes at most; a row that does not fit
into the card's memory, or into these minutes, says so. Run again, it goes on where it was stopped:
rows that are done lie in the working folder, one file a card and version of torch. Nothing is
downloaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ppcl_engine.system.atomic import read_json, write_json
from ppcl_engine.system.machine import resolve_device

from ..shared import output
from . import compiling, detecting, distilling, sparse, steps, tuning
from .card import GB, Card, slug, too_large
from .scale import FULL, QUICK, Scale
from .table import markdown

PARTS = {
    "step": steps,
    "distil-depth": distilling,
    "polish, finetune": tuning,
    "2:4 kernels": sparse,
    "torch.compile": compiling,
    "detect": detecting,
}
LIMIT = 480.0  # seconds a part
CHILD = "--child"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows that are done, in a file that is written whenever there is another."""

    path: Path

    def of(self, part: str) -> dict[str, dict]:
        return self._all().get(part, {})

    def put(self, part: str, row: str, values: dict) -> None:
        parts = self._all()
        parts.setdefault(part, {})[row] = values
        write_json(self.path, parts)

    def _all(self) -> dict[str, dict[str, dict]]:
        return read_json(self.path) if self.path.exists() else {}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    card: Card
    scale: Scale
    folder: Path
    """of this card; holds the rows, and what is needed meanwhile"""
    child: list[str]
    """the command that measures a part in a process of its own; empty: this process does"""

    @property
    def rows(self) -> Rows:
        return Rows(path=self.folder / "rows.json")

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def missing(self, part: str) -> list[str]:
        done = self.rows.of(part)
        names = PARTS[part].rows(self.card, self.scale, self.work)
        return [name for name in names if name not in done]

    def finish(self, part: str) -> None:
        """Measures what is missing of a part. A process that ends in a row, or is still in it when
        the time is over, cuts that row; the others go on."""
        end = time.monotonic() + LIMIT
        while self.missing(part):
            reason = self._measured(part, end - time.monotonic())
            if reason and (missing := self.missing(part)):
                self.rows.put(part, missing[0], {"cut": reason})

    def _measured(self, part: str, seconds: float) -> str:
        """Empty, or what went wrong, in a line."""
        if seconds <= 0:
            return f"the part's {LIMIT / 60:g} minutes were over"
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            return self._in_child(part, seconds) if self.child else self.measure(part)
        finally:
            shutil.rmtree(self.work)

    def _in_child(self, part: str, seconds: float) -> str:
        log = self.folder / f"{slug(part)}.log"
        with open(log, "w") as file:
            try:
                done = subprocess.run([*self.child, part], stderr=file, timeout=seconds)
            except subprocess.TimeoutExpired:
                return f"not done when the part's {LIMIT / 60:g} minutes were over"
        if not done.returncode:
            return ""
        last = (log.read_text().strip().splitlines() or ["no message"])[-1]
        return f"exit code {done.returncode}: {last[:200]} ({log.name})"

    def measure(self, part: str) -> str:
        """Measures in this process; the rows of a part that are done are left out."""
        works = PARTS[part].rows(self.card, self.scale, self.work)
        for name in self.missing(part):
            self.card.settle()
            try:
                values = works[name]()
            except torch.cuda.OutOfMemoryError:
                values = too_large(self.card)
            self.rows.put(part, name, values)
            print(f"{part}: {name}: {values}", flush=True)
        return ""

    def table(self) -> str:
        """The parts that are done."""
        done = [part for part in PARTS if not self.missing(part)]
        return markdown((part, PARTS[part].lines(self._in_order(part))) for part in done)

    def _in_order(self, part: str) -> dict[str, dict]:
        done = self.rows.of(part)
        return {name: done[name] for name in PARTS[part].rows(self.card, self.scale, self.work)}


def benchmark_of(chosen: Namespace) -> Benchmark:
    """Raises ValueError where there is no GPU, which the quick form does not need."""
    device = "cpu" if chosen.quick else resolve_device(chosen.device)
    if not (chosen.quick or device.startswith("cuda")):
        raise ValueError(
            "there is no GPU that torch sees on this machine; --quick runs without one"
        )
    if ":" in device:
        torch.cuda.set_device(device)
    card = Card.of(device)
    folder = (chosen.folder / card.folder_name).absolute()
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", device]
    command += ["--folder", str(chosen.folder), CHILD]
    return Benchmark(
        card=card,
        scale=QUICK if chosen.quick else FULL,
        folder=folder,
        child=[] if chosen.quick else command,
    )


def title(card: Card) -> str:
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f"{card.name}, {card.memory / GB:.1f} GB, torch {torch.__version__}{cuda}"


def main(arguments: list[str] | None = None) -> Path | None:
    parser = output.options("gpu", __doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda or cuda:1")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/gpu"), help="where rows and files go (60 GB)"
    )
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument(CHILD, choices=PARTS, help="measure this part in this process")
    chosen = output.parse(parser, arguments)
    try:
        benchmark = benchmark_of(chosen)
    except ValueError as error:
        parser.error(str(error))
    if chosen.child:
        benchmark.measure(chosen.child)
        return None
    for part in chosen.part:
        benchmark.finish(part)
    table = f"{title(benchmark.card)}\n\n{benchmark.table()}"
    print(f"\n{table}")
    rows = {part: benchmark.rows.of(part) for part in PARTS}
    values = {"card": asdict(benchmark.card), "parts": rows, "table": table.splitlines()}
    return output.write("gpu", chosen, values)


if __name__ == "__main__":
    main()
