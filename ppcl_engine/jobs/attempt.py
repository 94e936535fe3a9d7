"""One attempt of a job, in the worker's process: from claiming the run folder to the final state."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..settings.convert_settings import JobConfig
from ..settings.prune_settings import CalibrateConfig
from ..stages import run_stage
from ..system.launch_environment import launched_together
from .cancelling import CancelListener
from .failures import DONE, INTERRUPTED, UNEXPECTED, USER_ERROR, failure
from .reporter import Reporter
from .reuse import RESUMED, clear_scratch
from .spec import JobSpec, configs, read_spec
from .state import (
    CANCEL,
    STATE,
    JobState,
    Status,
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

if TYPE_CHECKING:
    from .preview import Preview


# seconds between two updates of a progress bar in a log; ten a second, as in a terminal, would fill the disk
LOG_EVERY = "30"
LAUNCHING = (
    5.0  # seconds to wait for the launcher, which holds the lock until it has written our pid
)


@dataclass
class Attempt:
    """One try at a job: its claimed run folder and the stages to run in it."""

    folder: Path
    spec: JobSpec
    stages: list[tuple[str, JobConfig]]
    """every stage of the job with its settings, also those that an earlier attempt finished"""
    state: JobState
    """as it was when this worker started"""
    rank: int
    """of this process among those that share the work; only rank 0 reports on it"""
    number: int = 0
    """of the stage that is running, from 1; 0 before the first"""

    def work(self) -> int:
        """The exit code."""
        listener = CancelListener(self.folder, _parent(self.state))
        ending = Ending(self, listener)
        with ending:
            listener.start()
            if self.rank:
                self._run(None, None)
            else:
                self._run_and_report(listener, ending)
        return ending.code

    def _run_and_report(self, listener: CancelListener, ending: Ending) -> None:
        """Writes the state first: importing torch takes seconds, and the job should show as running,
        and be cancellable, during them."""
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
        reporter = Reporter(self.folder, state, listener.asked)
        ending.reporter = listener.reporter = reporter
        reporter.write(always=True)
        append_event(self.folder, "started", pid=me)
        from .preview import Preview

        preview = Preview(self.folder, self.spec.preview_seconds, listener.asked)
        reporter.draw = preview.draw
        self._run(reporter, preview)

    def _run(self, reporter: Reporter | None, preview: Preview | None) -> None:
        """The stages that are not finished yet; without a reporter when another process reports."""
        from ..system.progress import listening

        first = finished_stages(read_events(self.folder))
        self._check(self.stages[first:], reporter)
        with listening(reporter):
            for number, (stage, config) in enumerate(self.stages[first:], start=first + 1):
                self.number = number
                if preview is not None:
                    preview.config = config
                if reporter is not None:
                    reporter.begin(number, stage)
                run_stage(stage, config)
                if reporter is not None:
                    reporter.finish()

    def _check(self, stages: list[tuple[str, JobConfig]], reporter: Reporter | None) -> None:
        """Raises ValueError if one of the stages cannot fit on this machine, before the first one
        starts."""
        from ..estimate.dry_run import refusal
        from ..estimate.needs import needs

        count = launched_together()
        calibrate = next((c for _, c in stages if isinstance(c, CalibrateConfig)), None)
        for _, config in stages:
            if line := refusal(config, calibrate, count):
                raise ValueError(line)
            if reporter is not None:
                wanted = needs(config, calibrate, count)
                append_event(self.folder, "estimated", **asdict(wanted))


class Ending:
    """A context manager that writes down how the job ended, however it ended.

    An unexpected error is raised again, so that Python prints its traceback into the log.
    """

    def __init__(self, attempt: Attempt, listener: CancelListener):
        self.attempt, self.listener = attempt, listener
        self.reporter: Reporter | None = None
        """None in a process that does not report, and before the job has begun"""
        self.code = DONE
        """the exit code of the worker"""

    def __enter__(self) -> Ending:
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> bool:
        self.listener.stop()
        status, line = self._outcome(error)
        if self.reporter is None and status == "failed":
            append_event(self.attempt.folder, "process_failed", rank=self.attempt.rank, error=line)
        if self.reporter is not None:
            # before the state is written: the disk may be full
            clear_scratch(self.attempt.folder, keep=RESUMED)
            self.reporter.write(always=True)
            end(self.attempt.folder, replace(self.reporter.state, status=status, error=line))
        if line and self.code != UNEXPECTED:
            print(f"worker: {line}", file=sys.stderr)
        return self.code != UNEXPECTED

    def _outcome(self, error: BaseException | None) -> tuple[Status, str]:
        """(final status, error line); also sets the exit code."""
        if error is None:
            return "done", ""
        # an interrupt while a C extension is imported surfaces as some other exception
        in_imports = self.listener.asked() and not self.attempt.number
        if (
            isinstance(error, KeyboardInterrupt)
            or in_imports
            or _is(error, "system.interruption", "Stopped")
        ):
            self.code = INTERRUPTED
            saved = f"; {error}" if _is(error, "system.interruption", "Stopped") else ""
            return "cancelled", f"{self.listener.reason or 'cancelled by Ctrl-C'}{saved}"
        line, self.code = failure(error, *self.attempt.stages[max(self.attempt.number, 1) - 1])
        cause = self._failure_of_others() if _is(error, "system.distributed", "Lost") else ""
        return "failed", cause or line

    def _failure_of_others(self) -> str:
        """The error of another process of this job, whose end made this one fail; "" if it wrote none."""
        events = read_events(self.attempt.folder)
        started = max(index for index, event in enumerate(events) if event["kind"] == "started")
        return next((e["error"] for e in events[started:] if e["kind"] == "process_failed"), "")


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if not sys.stderr.isatty():
        # tqdm reads it when it is imported, which happens later
        os.environ.setdefault("TQDM_MININTERVAL", LOG_EVERY)
    with ExitStack() as held:
        try:
            attempt = _claimed_attempt(options, held)
        except ValueError as error:
            print(f"worker: {error}", file=sys.stderr)
            return USER_ERROR
        return attempt.work()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ppcl_engine.jobs.worker", description="Run the job of a run folder."
    )
    parser.add_argument("run", type=Path, help="the folder with run.json")
    parser.add_argument(
        "--again",
        action="store_true",
        help="make another attempt of a run that failed or was cancelled",
    )
    parser.add_argument(
        "--model", type=Path, help="where the model is on this machine, if not where run.json says"
    )
    return parser


def _claimed_attempt(options: argparse.Namespace, held: ExitStack) -> Attempt:
    """An attempt at the job in the folder; `held` keeps its lock until the worker ends.

    Raises ValueError, in one line, if the folder is not a job's, or if the job has ended or is running.
    """
    folder = options.run.absolute()
    if options.again:
        folder = RunStore(folder.parent).again(folder.name).path
        print(f"worker: attempt {folder.name}", file=sys.stderr)
    spec = read_spec(folder)
    stages = configs(spec, folder, options.model)
    rank = int(os.environ.get("RANK") or 0)
    if rank == 0:
        held.enter_context(
            claimed(folder, LAUNCHING if _is_queued(folder) else 0.0, "a job's worker")
        )
    return Attempt(folder, spec, stages, _startable(folder, rank), rank)


def _startable(folder: Path, rank: int) -> JobState:
    """The state of a job that may start now. Raises ValueError for one that has ended or is running."""
    if not (folder / STATE).exists():  # run.json was written by hand
        queued = JobState(status="queued")
        return queued if rank else write_state(folder, queued)
    state = read_state(folder)
    if state.is_final:
        why = f" ({state.error})" if state.error else ""
        again = "" if state.status == "done" else "; --again starts another attempt"
        raise ValueError(f"{folder.name} {state.in_words}{why}, and that is final{again}")
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
    """(pid, start time) of the process that launched this one; None if it was started otherwise."""
    # on Windows a venv's python.exe starts a second process, whose parent is the pid in the state
    if state.pid in (os.getpid(), os.getppid()) and state.parent_pid is not None:
        return state.parent_pid, state.parent_started or 0.0
    return None


def _is(error: BaseException, module: str, name: str) -> bool:
    """Whether the error is of a class of the engine, without importing the class's module: if the
    module's import is what failed, the error cannot be of that class."""
    imported = sys.modules.get(f"{__name__.rsplit('.', 2)[0]}.{module}")
    return imported is not None and isinstance(error, getattr(imported, name))
