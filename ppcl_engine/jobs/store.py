"""A folder of runs, each named by a hash of all that decides its results: the same request finds
the same run.

A new run begins with the files of the run before it, as hard links: nothing is computed twice.
Every file is replaced whole, never written into, so nothing that a run does can change another one.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from ..plan import plan_from_value
from ..system.atomic import read_json
from ..system.json_text import json_text
from .launch import Process, check_name, launch
from .reuse import (
    CALIBRATION,
    clear_scratch,
    seed_attempt,
    seed_from_sibling,
    seed_from_upstream,
    sha256_of,
)
from .spec import ORDER, Order, configs, read_order, write_order
from .state import (
    STATE,
    JobState,
    append_event,
    current_state,
    finished_stages,
    is_abandoned,
    read_events,
    read_state,
    settle,
    write_state,
)

KIND = re.compile(r"[a-z][a-z0-9-]{0,39}")
ATTEMPT = re.compile(r"(.*-[0-9a-f]{8})(?:-([1-9][0-9]*))?")
EXPORTING = {"export", "sparsify"}
UNFINISHED = ".new-"  # a folder that is being filled; no name of a run begins like this
FORGOTTEN = 3600.0  # seconds after which such a folder is of a process that was killed
# settings that no result hangs on
SAME_BITS = {"streamed", "checkpointing", "save_every", "dry_run", "run"}


@dataclass(frozen=True)
class Prepared:
    """is_new: it has never been started."""

    path: Path
    is_new: bool


class RunStore:
    """Runs under one root, such as ComfyUI's output folder + "ppcl". Made on first use."""

    def __init__(self, root: Path):
        self.root = Path(root).resolve()

    def path(self, name: str) -> Path:
        """Raises ValueError, in one line, for text that cannot name a run, and unless it names a real
        folder of this root."""
        folder = self.root / check_name(name)
        if folder.is_symlink() or not folder.is_dir() or folder.resolve().parent != self.root:
            raise ValueError(f"run {name} is not in {self.root}; choose one from the list")
        return folder

    def names(self) -> list[tuple[str, JobState]]:
        """Newest first. A run whose state is rubbish is there as failed, with the line that says
        so."""
        made = {path: at for path in self._entries() if (at := self.made_at(path)) is not None}
        return [
            (path.name, _state_to_show(path)) for path in sorted(made, key=made.get, reverse=True)
        ]

    def made_at(self, path: Path) -> int | None:
        """When an entry of the root was made, in nanoseconds; None: it is not the folder of a
        job."""
        if path.name.startswith(".") or path.is_symlink() or not (path / STATE).is_file():
            return None
        return (path / ORDER).stat().st_mtime_ns if (path / ORDER).is_file() else None

    def exports_of(self, path: Path) -> list[Path]:
        """Model files that a run wrote; none before it is done."""
        order = _order_of(path) if _state_to_show(path).status == "done" else None
        exporting = order is not None and EXPORTING & dict(order.stages).keys()
        return sorted((path / "exports").rglob("*.safetensors")) if exporting else []

    def prepare(self, kind: str, stages, upstream: str = "", **options) -> Prepared:
        """The run that does these (stage, settings) pairs on the files of `upstream`; options: an
        Order's.

        One that is done, at work or queued is found again. One that failed, was cancelled or lost
        its worker gets another attempt, which goes on from its files; a changed one takes what is
        still valid from the last of its kind. Raises ValueError for an unknown stage or setting and
        for an upstream that is not done.
        """
        stages = tuple((stage, dict(settings)) for stage, settings in stages)
        order = Order(
            stages=stages, upstream=upstream, identity=self._identity(stages, upstream), **options
        )
        return self._prepare(_base(kind, order.identity), order)

    def again(self, name: str) -> Prepared:
        """Another attempt of a run that failed or was cancelled; the run itself where it is done or
        at work."""
        match = ATTEMPT.fullmatch(name)
        return self._prepare(match[1] if match else name, read_order(self.path(name)))

    def derive(
        self, kind: str, upstream: str, write: Callable[[Path], None], identity_of: dict
    ) -> Path:
        """A run that is made at once: the upstream's files, then what `write(folder)` puts there.
        Made again from the same upstream and `identity_of`, it is the one that is there. `write`
        may replace .json files freely; other files of the upstream are hard links, to be replaced
        as `atomic.replacing` does."""
        before = self._identity_of_run(upstream) if upstream else ""
        identity = _hash({"upstream": before, **identity_of})
        base, order = _base(kind, identity), Order(stages=(), upstream=upstream, identity=identity)
        while not (made := _ours(attempts := self._attempts(base), identity)):
            with self._filling() as folder:
                if upstream:
                    seed_from_upstream(self._finished(upstream), folder, order, None)
                write(folder)
                if upstream:
                    _drop_parts_of_another_plan(self.path(upstream), folder)
                write_order(folder, order)
                write_state(folder, JobState(status="done"))
                self._publish(folder, _next_name(base, attempts))
        return made[-1]

    def start(self, path: Path) -> Process | None:
        """Launches the worker; None where one is at work already. Raises ValueError for a run that
        has ended."""
        path = self.path(Path(path).name)
        state = read_state(path)
        at_work = not state.is_final and state.pid is not None and not is_abandoned(state)
        return None if at_work else launch(path, read_order(path).outlive)

    def _prepare(self, base: str, order: Order) -> Prepared:
        # unknown stages and settings are refused before anything is written
        configs(order, self.root / base)
        while True:
            attempts = self._attempts(base)
            newest = (_ours(attempts, order.identity) or [None])[-1]
            if newest is not None:
                state = settle(newest)
                if state.status not in ("failed", "cancelled"):
                    return Prepared(newest, state.status == "queued" and state.pid is None)
            name = _next_name(base, attempts)
            with self._filling() as folder:
                self._fill(folder, base, order, newest)
                if self._publish(folder, name):
                    if newest is not None:
                        clear_scratch(newest)
                    return Prepared(self.root / name, True)

    def _fill(self, folder: Path, base: str, order: Order, newest: Path | None) -> None:
        write_order(folder, order)
        if newest is not None:
            append_event(
                folder, "continued", run=newest.name, finished=finished_stages(read_events(newest))
            )
            seed_attempt(newest, folder)
        else:
            if order.upstream:
                made_with = self._stage_settings(order.upstream, "distill-depth")
                seed_from_upstream(self._finished(order.upstream), folder, order, made_with)
            for sibling, its_order in self._siblings(base):
                seed_from_sibling(sibling, folder, order, its_order)
        write_state(folder, JobState(status="queued", stages=len(order.stages)))

    def _siblings(self, base: str) -> Iterator[tuple[Path, Order]]:
        """Runs of the same kind, newest first."""
        kind = base.rpartition("-")[0]
        for name, _ in self.names():
            match = ATTEMPT.fullmatch(name)
            if (
                match
                and match[1].rpartition("-")[0] == kind
                and (order := _order_of(self.root / name))
            ):
                yield self.root / name, order

    def _attempts(self, base: str) -> dict[int, Path]:
        """By number, in order; whatever has such a name."""
        found = {}
        for path in self.root.iterdir() if self.root.is_dir() else ():
            match = re.fullmatch(re.escape(base) + r"(?:-([1-9][0-9]*))?", path.name)
            if match:
                found[int(match[1] or 1)] = path
        return dict(sorted(found.items()))

    def _entries(self) -> list[Path]:
        return list(self.root.iterdir()) if self.root.is_dir() else []

    def _finished(self, name: str) -> Path:
        path = self.path(name)
        if (path / STATE).exists() and (state := current_state(path)).status != "done":
            raise ValueError(f"run {name} is {state.status}, not done; let it finish first")
        return path

    def _identity(self, stages: tuple[tuple[str, dict], ...], upstream: str) -> str:
        order = Order(stages=stages)
        rows = [[stage, _marked(config)] for stage, config in configs(order, self.root / "run")]
        return _hash(
            {"stages": rows, "upstream": self._identity_of_run(upstream) if upstream else ""}
        )

    def _identity_of_run(self, name: str) -> str:
        """Its order's, or its recording's content."""
        path = self.path(name)
        if (path / ORDER).exists() and (identity := read_order(path).identity):
            return identity
        if (path / CALIBRATION).is_file():
            return sha256_of(path / CALIBRATION)
        raise ValueError(f"run {name} has neither an order nor a recording; choose another")

    def _stage_settings(self, name: str, stage: str) -> dict | None:
        """Of the last run, from this one upwards, that did the stage."""
        while name and (self.path(name) / ORDER).exists():
            order = read_order(self.path(name))
            found = [settings for done, settings in order.stages if done == stage]
            if found:
                return found[-1]
            name = order.upstream
        return None

    @contextmanager
    def _filling(self) -> Iterator[Path]:
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob(f"{UNFINISHED}*"):
            if time.time() - left.stat().st_mtime > FORGOTTEN:
                shutil.rmtree(left, ignore_errors=True)
        folder = self.root / f"{UNFINISHED}{secrets.token_hex(6)}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, folder: Path, name: str) -> bool:
        """Whether the folder got the name; another caller may have been faster."""
        try:
            os.rename(folder, self.root / check_name(name))
        except OSError:
            if not (self.root / name).exists():
                raise
            return False
        return True


def _base(kind: str, identity: str) -> str:
    if not KIND.fullmatch(kind):
        raise ValueError(f"{kind!r} is not a kind of run; use a-z, 0-9 and '-'")
    return f"{kind}-{identity[:8]}"


def _ours(attempts: dict[int, Path], identity: str) -> list[Path]:
    """Runs of the very same request; eight digits of a hash may be shared with others."""
    real = [path for path in attempts.values() if path.is_dir() and not path.is_symlink()]
    orders = [(path, _order_of(path)) for path in real]
    return [path for path, order in orders if order and order.identity == identity]


def _next_name(base: str, attempts: dict[int, Path]) -> str:
    number = max(attempts, default=0) + 1
    return base if number == 1 else f"{base}-{number}"


def _order_of(path: Path) -> Order | None:
    """None where it is rubbish, or of another version."""
    try:
        order = read_order(path)
        configs(order, path)
    except ValueError:
        return None
    return order


def _state_to_show(path: Path) -> JobState:
    try:
        return current_state(path)
    except ValueError as error:
        return JobState(status="failed", error=str(error))


def _hash(values: dict) -> str:
    return hashlib.sha256(json_text(values, sort_keys=True, default=str).encode()).hexdigest()


def _marked(config) -> dict:
    """Settings that decide the results; a file or folder counts by name, sizes and times, not by where
    it is."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in SAME_BITS}
    return {name: [v.name, _mark(v)] if isinstance(v, Path) else v for name, v in values.items()}


def _mark(path: Path) -> list:
    files = (
        sorted(p for p in path.rglob("*") if p.is_file())
        if path.is_dir()
        else [path]
        if path.is_file()
        else []
    )
    return [[str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _drop_parts_of_another_plan(upstream: Path, folder: Path) -> None:
    """Projections and polished parts are fitted to all intervals and sites together."""
    before, now = (_parts_of_plan(path / "plan.json") for path in (upstream, folder))
    if before != now:
        for name in ("width", "polished"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _parts_of_plan(path: Path) -> tuple | None:
    if not path.exists():
        return None
    plan = plan_from_value(read_json(path), path)
    return plan.sites, [(interval.first, interval.last) for interval in plan.intervals]
