"""Damaged files, wrong command lines, kills and pairs of processes: is any of it a traceback, a
hang, or silence?

files: a random damage (damages.py) to one file of every kind that the engine reads (subjects.py),
in this process: the right result, or one line that names the file. command lines: a stage with one
random setting, in this process: exit code 0 or 2 and one line. kills: kill -9 at a random moment of
a training, which then goes on: the same bits as one that was left alone. pairs: the same training
twice at once in one run folder: one works, the other says who does, the same bits again. Goes on
where it was stopped: every trial is a function of its number, and what is done lies in
runs/hostile.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from ppcl_engine import __main__ as command_line
from ppcl_engine.stages import STAGES
from ppcl_engine.system import hashes

from ..shared import output
from .damages import damage_of
from .subjects import Subject, subjects
from .trainings import CHANGED, HANG, REFUSED, SAME, SILENT, TRACEBACK, Outcome, Trainings

LONGEST = 5.0  # seconds that any answer may take
SHARES = {"command lines": 0.08, "kills": 1 / 400, "pairs": 1 / 500}
VALUES = (
    "",
    "x",
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e30",
    "18446744073709551616",
    "1e999",
    "٣",
    "../..",
    "/dev/null",
    "[1]",
    "true",
    "a" * 500,
    "gpu",
    "cuda:99",
    "9-3",
    "text:1-99999999",
    "\n",
    "3.5",
)


class Late(BaseException):
    """Nothing catches it on the way."""


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """In a folder of its own, where odd values of --run make their folders."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Late in the main thread; systems without the signal wait."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(number, frame):
        raise Late

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def outcome(
    subject: Subject, right: str | None, draw: random.Random, longest: float = 4 * LONGEST
) -> Outcome:
    """Damages one file, judges what its reader does, and restores the file. right: the result of the
    undamaged file; None if that is refused already."""
    path = draw.choice(subject.files)
    content = path.read_bytes()
    kind, damaged = damage_of(path.name, content, draw)
    try:
        _put(path, damaged)
        return _judged(subject, right, f"{kind} {path.name}", longest, damaged == content)
    finally:
        _put(path, content)


def _put(path: Path, content: bytes) -> None:
    """A file of its own, checked anew."""
    path.unlink()
    path.write_bytes(content)
    hashes.forget()


def _judged(
    subject: Subject, right: str | None, what: str, longest: float, unchanged: bool
) -> Outcome:
    begun = time.perf_counter()
    try:
        with within(longest), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = subject.read()
    except Late:
        return Outcome(HANG, what, "", longest)
    except ValueError as error:
        said, seconds = str(error), time.perf_counter() - begun
        named = any(place.name in said or str(place.parent) in said for place in subject.files)
        one_line = len(said.splitlines()) == 1 and type(error) is ValueError
        return Outcome(REFUSED if named and one_line else TRACEBACK, what, said[:500], seconds)
    except Exception:  # whatever comes is what is looked for
        return Outcome(
            TRACEBACK, what, "".join(traceback.format_exc().splitlines(True)[-6:])[:1500]
        )
    seconds = time.perf_counter() - begun
    if found == right or unchanged:
        return Outcome(SAME, what, seconds=seconds)
    return Outcome(SILENT if subject.hashed or right is None else CHANGED, what, seconds=seconds)


def command(draw: random.Random, teacher: Path, run: Path) -> list[str]:
    """A stage, complete but for one setting that is drawn."""
    stage = draw.choice([name for name in STAGES if name != "demo"])
    kind, _ = STAGES[stage]
    words, hints = [stage], get_type_hints(kind)
    given = {"model": teacher, "run": run, "device": "cpu", "path": teacher, "prompt": "a"}
    changed = draw.choice([f for f in fields(kind) if f.name != "dry_run"])
    for name, value in given.items():
        if name in hints and name != changed.name:
            words += [f"--{name}", str(value)]
    flag = f"--{changed.name.replace('_', '-')}"
    if hints[changed.name] is bool:
        return [*words, flag, draw.choice(VALUES)]
    choices = get_args(hints[changed.name]) if get_origin(hints[changed.name]) is Literal else ()
    return [*words, flag, draw.choice([*VALUES, *map(str, choices)])]


def run_command(words: list[str], longest: float = LONGEST) -> Outcome:
    """Exit code 0, or 2 with one line."""
    out, err, begun = io.StringIO(), io.StringIO(), time.perf_counter()
    what = " ".join(words[:1] + words[-2:])[:200]
    try:
        with (
            elsewhere(),
            within(longest),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            code = command_line.main(words)
    except SystemExit as end:
        code = end.code
    except Late:
        return Outcome(HANG, what, "", longest)
    except Exception:  # whatever comes is what is looked for
        return Outcome(
            TRACEBACK, what, "".join(traceback.format_exc().splitlines(True)[-4:])[:1500]
        )
    said, seconds = err.getvalue(), time.perf_counter() - begun
    lines = [
        line for line in said.splitlines() if line.strip() and "\r" not in line and "%|" not in line
    ]
    if code == 0:
        return Outcome(SAME, what, seconds=seconds)
    return Outcome(
        REFUSED if code == 2 and len(lines) <= 1 else TRACEBACK, what, said[-800:], seconds
    )


def counts(total: int, quick: bool) -> dict[str, int]:
    own = {name: max(1, round(total * share)) for name, share in SHARES.items()}
    own = dict.fromkeys(own, 0) if quick else own
    return {"files": max(1, total - sum(own.values())), **own}


def trials(
    folder: Path, total: int, quick: bool
) -> Iterator[tuple[str, str, Callable[[random.Random], Outcome]]]:
    """(number, class, what does it)"""
    found = subjects(folder / "subjects")
    right = {s.name: None if s.name in ("GGUF", "LoRA") else s.read() for s in found}
    numbers = counts(total, quick)
    for number in range(numbers["files"]):
        subject = found[number % len(found)]
        yield (
            f"files {number}",
            subject.name,
            lambda draw, s=subject: outcome(s, right[s.name], draw),
        )
    teacher = folder.resolve() / "subjects" / "single" / "teacher.safetensors"
    for number in range(numbers["command lines"]):
        run = folder.resolve() / "commands"
        yield (
            f"command {number}",
            "command line",
            lambda draw, run=run: run_command(command(draw, teacher, run)),
        )
    trainings: list[Trainings] = []

    def training() -> Trainings:
        if not trainings:
            trainings.append(Trainings(folder / "subjects"))
        return trainings[0]

    for number in range(numbers["kills"]):
        yield f"kill {number}", "kill", lambda draw: training().kill(draw)
    for number in range(numbers["pairs"]):
        yield f"pair {number}", "pair", lambda draw: training().pair(draw)


def measure(folder: Path, chosen) -> dict:
    """What was done before is counted as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    done_file = folder / f"done_{chosen.seed}.jsonl"
    done = (
        {row["number"]: row for row in map(json.loads, done_file.read_text().splitlines())}
        if done_file.exists()
        else {}
    )
    begun, last = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory(dir=folder) as scratch, open(done_file, "a") as file:
        for place, (number, kind, work) in enumerate(
            trials(Path(scratch), chosen.count, chosen.quick), start=1
        ):
            if number not in done:
                result = work(random.Random(f"{chosen.seed} {number}"))
                done[number] = {"number": number, "class": kind, **asdict(result)}
                file.write(json.dumps(done[number]) + "\n")
                file.flush()
            if time.monotonic() - last > 2:
                last = time.monotonic()
                print(
                    f"\r{place} of {chosen.count}, {last - begun:.0f} s, {dict(_kinds(done))}",
                    end="",
                    flush=True,
                )
    print()
    return summary(list(done.values()))


def _kinds(done: dict[str, dict]) -> Counter:
    return Counter(row["kind"] for row in done.values())


def summary(rows: list[dict]) -> dict:
    """classes: of each class how many ended how; faults: the first of every kind of fault."""
    classes: dict[str, Counter] = {}
    for row in rows:
        classes.setdefault(row["class"], Counter())[row["kind"]] += 1
    kinds = Counter(row["kind"] for row in rows)
    slow = [
        row for row in rows if row["class"] not in ("kill", "pair") and row["seconds"] > LONGEST
    ]
    return {
        "tried": len(rows),
        "tracebacks": kinds[TRACEBACK],
        "hangs": kinds[HANG] + sum(row["kind"] != HANG for row in slow),
        "silent": kinds[SILENT],
        "classes": {name: dict(found) for name, found in sorted(classes.items())},
        "longest_seconds": max(
            (r["seconds"] for r in rows if r["class"] not in ("kill", "pair")), default=0.0
        ),
        "faults": [row for row in rows if row["kind"] in (TRACEBACK, HANG, SILENT)][:40],
    }


def show(values: dict) -> None:
    kinds = (SAME, REFUSED, CHANGED, SILENT, TRACEBACK, HANG)
    rows = [
        [name, *(found.get(kind, 0) for kind in kinds)] for name, found in values["classes"].items()
    ]
    output.print_table("what came of it", ["class", *kinds], rows)
    for row in values["faults"][:10]:
        print(f"{row['kind']} {row['number']}: {row['what']}: {row['said'][-300:]}")


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("hostile", __doc__)
    parser.add_argument("--count", type=int, help="trials in all (2000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other damages")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/hostile"), help="where it goes on from"
    )
    chosen = output.parse(parser, arguments)
    chosen.count = chosen.count or (60 if chosen.quick else 2000)
    torch.set_num_threads(1)
    values = measure(chosen.folder, chosen)
    show(values)
    return output.write("hostile", chosen, values)


if __name__ == "__main__":
    main()
