"""Jobs that are killed, cancelled and left by their parent: do they end in the same bits, how soon,
is anything left?

kill_resume: one run of every stage is left alone; then, for each kill, the same run gets kill -9 at
a random moment of a stage (the stages in turn), another attempt goes on from what it left, and its
files are compared with those of the run left alone: calibration, probes, curves, plan (without
measured milliseconds), students, projections, polished and tuned parts, the tensors of the exported
bundle. cancel: one chain of attempts, cancelled in every stage at a random moment; seconds from the
request to the end of the process, beside those of a step, which a training finishes, and the
machine's load. parent: the process that launched the worker gets kill -9. On the bundled teacher
with reduced numbers; batches are the demo's where something is cancelled, smaller where it is
killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from ppcl_engine.demo.bundled import TEACHER, render_pictures
from ppcl_engine.jobs.launch import WORKER
from ppcl_engine.jobs.state import ask_to_cancel, current_state, read_events, read_state
from ppcl_engine.jobs.store import RunStore

from .shared import output

SEED = 0
KIND = "bench"
PREVIEW_SECONDS = 10.0
LONGEST = 600.0  # seconds that a run may take
PARTS = (
    "calibration.safetensors",
    "curves.safetensors",
    "probes",
    "depth",
    "width",
    "polished",
    "tuned",
)
PARENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ppcl_engine.jobs.store import RunStore
process = RunStore(Path(sys.argv[2])).start(Path(sys.argv[2]) / sys.argv[3])
print("launched", flush=True)
time.sleep(1000)
"""


def stages(images: Path, samples: int, batch: int) -> list[tuple[str, dict]]:
    common = {"model": TEACHER, "device": "cpu"}
    settings = {
        "calibrate": {"images": images, "samples": samples, "batch": batch},
        "probe": {"train_steps": 2},
        "detect": {"longest": 2, "bootstrap": 10, "remove": 3},
        "distill-depth": {"rounds": 3, "updates": 8, "learning_rate": 3e-3},
        "detect-width": {"share": 0.8, "kinds": "ffn_image", "form": "gated", "samples": batch},
        "distill-width": {"rounds": 2, "updates": 4, "learning_rate": 1e-3},
        "polish": {"steps": 6, "save_every": 2, "learning_rate": 1e-3},
        "variants": {"samples": batch},
        "finetune": {"steps": 6, "save_every": 2, "learning_rate": 1e-3},
        "export": {},
    }
    return [(stage, {**common, **own}) for stage, own in settings.items()]


class Jobs:
    """The same request in a folder of its own."""

    def __init__(self, root: Path, wanted: list[tuple[str, dict]]):
        self.store, self.wanted = RunStore(root), wanted

    def start(self) -> tuple[Path, subprocess.Popen | None]:
        path = self.store.prepare(KIND, self.wanted, preview_seconds=PREVIEW_SECONDS).path
        return path, None if read_state(path).status == "done" else self.store.start(path)

    def finish(self) -> Path:
        """Attempts to the end."""
        path, process = self.start()
        if process is not None:
            process.wait(LONGEST)
        state = read_state(path)
        if state.status != "done":
            raise ValueError(f"{path} is {state.status}: {state.error}")
        return path


def bits(path: Path) -> str:
    """Hash of all that does not measure time."""
    digest = hashlib.sha256()
    files = [
        f for part in PARTS for f in sorted((path / part).rglob("*.safetensors")) or [path / part]
    ]
    for file in files:
        digest.update(str(file.relative_to(path)).encode() + file.read_bytes())
    plan = json.loads((path / "plan.json").read_text())
    plan["variants"] = [
        {k: v for k, v in variant.items() if k != "milliseconds"} for variant in plan["variants"]
    ]
    digest.update(json.dumps(plan, sort_keys=True).encode())
    bundle = (path / "exports" / "pruned.ppcl.safetensors").read_bytes()
    digest.update(bundle[8 + struct.unpack("<Q", bundle[:8])[0] :])
    return digest.hexdigest()


def spans(path: Path) -> dict[str, tuple[float, float]]:
    """stage -> (seconds after the start of the worker, seconds that it takes)"""
    events = read_events(path)
    begun = next(e["time"] for e in events if e["kind"] == "started")
    ends = {e["stage"]: e["time"] for e in events if e["kind"] == "finished"}
    return {
        e["stage"]: (e["time"] - begun, ends[e["stage"]] - e["time"])
        for e in events
        if e["kind"] == "stage"
    }


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LONGEST
    while not true():
        if time.monotonic() > end:
            raise ValueError(f"{what} did not happen in {LONGEST:.0f} s")
        time.sleep(0.01)


def in_stage(path: Path, stage: str) -> bool:
    return (state := current_state(path)).is_final or state.stage == stage


def kills(
    root: Path, wanted: list, count: int, times: dict[str, tuple[float, float]], expected: str
) -> Iterator[dict]:
    moments, names = random.Random(SEED), list(times)
    for number in range(count):
        stage, said = names[number % len(names)], None
        # it may end before the signal comes; then another moment
        while said is None or said.is_final:
            jobs = Jobs(root / f"kill{number}_{moments.random()}", wanted)
            path, process = jobs.start()
            until(lambda path=path, stage=stage: in_stage(path, stage), f"stage {stage}")
            time.sleep(moments.uniform(0, times[stage][1]))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            said = read_state(path)
        row = {"planned_stage": stage, "stage": said.stage, "step": said.step, "steps": said.steps}
        row["said"] = current_state(path).status
        yield {
            **row,
            "identical": bits(jobs.finish()) == expected,
            "attempts": len(jobs.store.names()),
        }


def cancels(root: Path, wanted: list, times: dict[str, tuple[float, float]]) -> Iterator[dict]:
    """Every attempt goes on where the one before was cancelled, until it is in the next stage."""
    moments, jobs = random.Random(SEED), Jobs(root / "cancel", wanted)
    for stage, (_, seconds) in times.items():
        path, process = jobs.start()
        until(lambda path=path, stage=stage: in_stage(path, stage), f"stage {stage}")
        time.sleep(moments.uniform(0, 0.7 * seconds))
        at, begun = current_state(path), time.monotonic()
        ask_to_cancel(path)
        code, state = process.wait(LONGEST), read_state(path)
        if state.status == "done":  # the last stage was faster
            continue
        yield {
            "stage": at.stage,
            "seconds": time.monotonic() - begun,
            "status": state.status,
            "code": code,
            "step_seconds": at.rate and 1 / at.rate,
            "load": os.getloadavg()[0],
        }


def cancel_at_start(root: Path, wanted: list) -> dict:
    """While Python still reads its libraries."""
    path, process = Jobs(root / "start", wanted).start()
    until(lambda: current_state(path).status == "running", "the start")
    begun = time.monotonic()
    ask_to_cancel(path)
    code = process.wait(LONGEST)
    return {
        "stage": "start",
        "seconds": time.monotonic() - begun,
        "status": read_state(path).status,
        "code": code,
        "step_seconds": None,
        "load": os.getloadavg()[0],
    }


def parent_killed(root: Path, wanted: list) -> dict:
    """Seconds from the end of the process that launched a worker to the worker's own."""
    folder = root / "parent"
    path = RunStore(folder).prepare(KIND, wanted).path
    code = [sys.executable, "-c", PARENT, str(WORKER.parents[2]), str(folder), path.name]
    with subprocess.Popen(code, stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        until(lambda: in_stage(path, "detect"), "stage detect")
        begun = time.monotonic()
        parent.kill()
    until(lambda: current_state(path).is_final, "the worker's end")
    until(lambda: not left_of(folder), "the process's end")
    return {
        "seconds": time.monotonic() - begun,
        "status": read_state(path).status,
        "error": read_state(path).error,
    }


def left_of(root: Path) -> list[int]:
    """Processes that work in a folder under `root`."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = process.info["cmdline"] or []
        if str(WORKER) in words and any(word.startswith(str(root)) for word in words):
            found.append(process.info["pid"])
    return found


def previews(path: Path) -> dict:
    """What they took of the whole run."""
    events = read_events(path)
    seconds = [e["seconds"] for e in events if e["kind"] == "preview"]
    whole = events[-1]["time"] - events[0]["time"]
    return {"count": len(seconds), "seconds": sum(seconds), "run_seconds": whole}


def measure(root: Path, chosen) -> dict:
    small, batch = 24, 12
    large, demo_batch = (small, batch) if chosen.quick else (96, 48)
    count = chosen.kills or (2 if chosen.quick else 10)
    images = render_pictures(root / "images", large, SEED)
    wanted = stages(images, small, batch)
    alone = Jobs(root / "alone", wanted).finish()
    times, expected = spans(alone), bits(alone)
    print(
        "left alone:",
        ", ".join(f"{stage} {seconds:.1f} s" for stage, (_, seconds) in times.items()),
        flush=True,
    )
    killed, cancelled = [], [cancel_at_start(root, wanted)]
    for row in kills(root, wanted, count, times, expected):
        print(
            f"killed in {row['stage']} at {row['step']} of {row['steps']}: identical {row['identical']}",
            flush=True,
        )
        killed.append(row)
    for row in cancels(root, stages(images, large, demo_batch), times):
        print(f"cancelled in {row['stage']}: {row['seconds']:.2f} s, {row['status']}", flush=True)
        cancelled.append(row)
    parent = parent_killed(root, wanted)
    return {
        "kill_resume": {
            "kills": len(killed),
            "identical": all(row["identical"] for row in killed),
            "rows": killed,
        },
        "cancel_seconds_max": max(row["seconds"] for row in cancelled),
        "cancels": cancelled,
        "parent_killed": parent,
        "processes_left": len(left_of(root)),
        "stage_seconds": {stage: seconds for stage, (_, seconds) in times.items()},
        "previews": previews(alone),
        "killed_with": {"samples": small, "batch": batch},
        "cancelled_with": {"samples": large, "batch": demo_batch},
    }


def show(values: dict) -> None:
    rows = [
        [r["stage"], f"{r['step']} of {r['steps']}", r["said"], r["identical"]]
        for r in values["kill_resume"]["rows"]
    ]
    output.print_table(
        "kill -9, then another attempt", ["killed in", "step", "state says", "same bits"], rows
    )
    rows = [
        [
            r["stage"],
            f"{r['seconds']:.2f}",
            f"{r['step_seconds']:.2f}" if r["step_seconds"] else "-",
            f"{r['load']:.1f}",
        ]
        for r in values["cancels"]
    ]
    output.print_table(
        "cancelled", ["in", "s to the process's end", "s a step", "machine's load"], rows
    )
    parent = values["parent_killed"]
    print(
        f"\nparent killed: worker gone after {parent['seconds']:.2f} s; processes left: {values['processes_left']}"
    )


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("jobs", __doc__)
    parser.add_argument("--kills", type=int, help="kill -9 this often (10)")
    chosen = output.parse(parser, arguments)
    with tempfile.TemporaryDirectory() as folder:
        values = measure(Path(folder), chosen)
    show(values)
    return output.write("jobs", chosen, values)


if __name__ == "__main__":
    main()
