"""A worker's run from claim to end."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..settings.base_settings import Common
from ..stages import run_stage
from .failures import DONE, INTERRUPTED, UNEXPECTED, USER_ERROR, failure
from .reporter import Reporter
from .reuse import RESUMED, clear_scratch
from .spec import Order, configs, read_order
from .state import (
    CANCEL,
    STATE,
    JobState,
    append_event,
    claimed,
    end,
    finished_stages,
    is_abandoned,
    process_of,
    read_events,
    read_state,
    write_state,
)
from .store import RunStore
from .watcher import Watcher

if TYPE_CHECKING:
    from .preview import Preview


# seconds between two drawings of a bar in a log; a terminal's ten a second would fill a disk
LOG_EVERY = "30"
LAUNCHING = 5.0  # seconds: the launcher holds the lock until it has written our pid


@dataclass
class Job:
    """rank: of this process among those that share the work; the first one (0) alone tells of it.
    number: of the present stage, 0 before the first."""

    folder: Path
    order: Order
    stages: list[tuple[str, Common]]
    state: JobState
    rank: int
    number: int = 0

    def work(self) -> int:
        """The exit code."""
        watcher = Watcher(self.folder, _parent(self.state))
        ending = Ending(self, watcher)
        with ending:
            watcher.start()
            if self.rank:
                self._run(watcher, None)
            else:
                self._tell(watcher, ending)
        return ending.code

    def _tell(self, watcher: Watcher, ending: Ending) -> None:
        """State first, so that the job is seen to run (and can be cancelled) while Python reads
        torch."""
        me, started = process_of(os.getpid())
        state = JobState(
            status="running",
            stages=len(self.stages),
            pid=me,
            process_started=started,
            host=platform.node(),
            parent_pid=self.state.parent_pid,
            parent_started=self.state.parent_started,
        )
        ending.reporter = watcher.reporter = Reporter(self.folder, state, watcher.asked)
        ending.reporter.write(always=True)
        append_event(self.folder, "started", pid=me)
        from .preview import Preview

        preview = Preview(self.folder, self.order.preview_seconds, watcher.asked)
        ending.reporter.draw = preview.draw
        self._run(watcher, preview)

    def _run(self, watcher: Watcher, preview: Preview | None) -> None:
        from ..system.progress import listening

        reporter = watcher.reporter
        first = finished_stages(read_events(self.folder))
        self._check(self.stages[first:], reporter)
        with listening(reporter):
            for number, (stage, config) in enumerate(self.stages[first:], start=first + 1):
                self.number = number
                if reporter is None:
                    run_stage(stage, config)
                    continue
                preview.config = config
                reporter.begin(number, stage)
                run_stage(stage, config)
                reporter.finish()

    def _check(self, stages: list[tuple[str, Common]], reporter: Reporter | None) -> None:
        """Raises ValueError for a stage that cannot fit, before the first one starts."""
        from ..estimate.dry_run import refusal
        from ..estimate.needs import needs

        calibrate = next((config for stage, config in stages if stage == "calibrate"), None)
        for _, config in stages:
            if line := refusal(config, calibrate):
                raise ValueError(line)
            if reporter is not None:
                append_event(self.folder, "estimated", **asdict(needs(config, calibrate)))


class Ending:
    """Says how the job ended, whatever it was that ended it. `code`: the exit code. What nobody
    expected goes on as it came, so that Python prints where it happened."""

    def __init__(self, job: Job, watcher: Watcher):
        self.job, self.watcher = job, watcher
        self.reporter: Reporter | None = None
        self.code = DONE

    def __enter__(self) -> Ending:
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> bool:
        self.watcher.stop()
        status, line = self._outcome(error)
        if self.reporter is None and status == "failed":
            append_event(self.job.folder, "process_failed", rank=self.job.rank, error=line)
        if self.reporter is not None:
            clear_scratch(self.job.folder, keep=RESUMED)  # first: the disk may be full
            self.reporter.write(always=True)
            end(self.job.folder, replace(self.reporter.state, status=status, error=line))
        if line and self.code != UNEXPECTED:
            print(f"worker: {line}", file=sys.stderr)
        return self.code != UNEXPECTED

    def _outcome(self, error: BaseException | None) -> tuple[str, str]:
        if error is None:
            return "done", ""
        # C extensions make other errors of an interrupt
        in_imports = self.watcher.asked() and not self.job.number
        if (
            isinstance(error, KeyboardInterrupt)
            or in_imports
            or _is(error, "system.interruption", "Stopped")
        ):
            self.code = INTERRUPTED
            saved = f"; {error}" if _is(error, "system.interruption", "Stopped") else ""
            return "cancelled", f"{self.watcher.reason or 'cancelled by Ctrl-C'}{saved}"
        line, self.code = failure(error, *self.job.stages[max(self.job.number, 1) - 1])
        return "failed", (
            self._told_by_others() if _is(error, "system.distributed", "Lost") else ""
        ) or line

    def _told_by_others(self) -> str:
        """Why another process ended, which is why this one did."""
        events = read_events(self.job.folder)
        begun = max(place for place, event in enumerate(events) if event["kind"] == "started")
        return next((e["error"] for e in events[begun:] if e["kind"] == "process_failed"), "")


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if not sys.stderr.isatty():
        # read when tqdm is imported, which comes later
        os.environ.setdefault("TQDM_MININTERVAL", LOG_EVERY)
    with ExitStack() as held:
        try:
            job = _taken(options, held)
        except ValueError as error:
            print(f"worker: {error}", file=sys.stderr)
            return USER_ERROR
        return job.work()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ppcl_engine.jobs.worker", description="Does what a run folder says."
    )
    parser.add_argument("run", type=Path, help="the folder with run.json")
    parser.add_argument(
        "--again", action="store_true", help="another attempt of a run that failed or was cancelled"
    )
    parser.add_argument(
        "--model", type=Path, help="the model in the place of the order's, on another machine"
    )
    return parser


def _taken(options: argparse.Namespace, held: ExitStack) -> Job:
    """Raises ValueError, in one line, for a folder that is not a job's, and for a job that has
    ended or is at work."""
    folder = options.run.absolute()
    if options.again:
        folder = RunStore(folder.parent).again(folder.name).path
        print(f"worker: attempt {folder.name}", file=sys.stderr)
    order = read_order(folder)
    stages = configs(order, folder, options.model)
    rank = int(os.environ.get("RANK") or 0)
    if rank == 0:
        held.enter_context(
            claimed(folder, LAUNCHING if _is_queued(folder) else 0.0, "a job's worker")
        )
    return Job(folder, order, stages, _startable(folder, rank), rank)


def _startable(folder: Path, rank: int) -> JobState:
    if not (folder / STATE).exists():  # a run.json that was written by hand
        queued = JobState(status="queued")
        return queued if rank else write_state(folder, queued)
    state = read_state(folder)
    if state.is_final:
        why = f" ({state.error})" if state.error else ""
        again = "" if state.status == "done" else "; --again starts another attempt"
        raise ValueError(f"{folder.name} is {state.status}{why}, and that is final{again}")
    if rank == 0 and is_abandoned(state):
        (folder / CANCEL).unlink(missing_ok=True)
    elif rank == 0 and state.status != "queued":
        raise ValueError(
            f"process {state.pid} on {state.host} is at work on {folder}; wait for it, or cancel it"
        )
    return state


def _is_queued(folder: Path) -> bool:
    return (folder / STATE).exists() and read_state(folder).status == "queued"


def _parent(state: JobState) -> tuple[int, float] | None:
    """Who launched this very process; on Windows a venv's python.exe stands between."""
    if state.pid in (os.getpid(), os.getppid()) and state.parent_pid is not None:
        return state.parent_pid, state.parent_started or 0.0
    return None


def _is(error: BaseException, module: str, name: str) -> bool:
    """Of a class in a module of the engine, which is not there when its import failed."""
    found = sys.modules.get(f"{__package__.rpartition('.')[0]}.{module}")
    return found is not None and isinstance(error, getattr(found, name))
