"""A folder of runs. Each is named by a hash of everything that decides its results, so the same request
finds the same run.

A new run starts from the files of the run before it, as hard links, so that nothing is computed twice.
Files are always replaced whole, never written into, so no run can change the files of another.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from .spec import SPEC_FILE, JobSpec, configs, read_spec, write_spec
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
ATTEMPT = re.compile(
    r"(.*-[0-9a-f]{8})(?:-([1-9][0-9]*))?"
)  # of a request: the first has no number
EXPORTING = {"export", "sparsify"}  # stages that write model files
MODEL_ENDINGS = (".safetensors", ".gguf")  # of those files
UNFINISHED = (
    ".new-"  # prefix of a folder that is being filled; the name of a run never starts with it
)
FORGOTTEN = 3600.0  # seconds after which the process that filled such a folder was surely killed
# settings that change no result
SAME_BITS = {"streamed", "checkpointing", "save_every", "offload", "dry_run", "run"}


@dataclass(frozen=True)
class Prepared:
    """The run of a request."""

    path: Path
    is_new: bool
    """whether it has never been started"""


def model_files_in(folder: Path) -> list[Path]:
    """The model files that were written into a run's folder of exports."""
    return sorted(path for path in folder.rglob("*") if path.suffix in MODEL_ENDINGS)


class RunStore:
    """The runs under one root, such as "ppcl" in ComfyUI's output folder. The root is created when the
    first run is."""

    def __init__(self, root: Path):
        self.root = Path(root).resolve()

    def path(self, name: str) -> Path:
        """The folder of a run. Raises ValueError, in one line, for text that cannot name a run, and for a
        name that is not a real folder of this root."""
        folder = self.root / check_name(name)
        if folder.is_symlink() or not folder.is_dir() or folder.resolve().parent != self.root:
            raise ValueError(f"run {name} is not in {self.root}; choose one from the list")
        return folder

    def names(self) -> list[tuple[str, JobState]]:
        """Newest first. A run whose state cannot be read is listed as failed, with the error."""
        made = {path: at for path in self._entries() if (at := self.made_at(path)) is not None}
        newest_first = sorted(made, key=made.__getitem__, reverse=True)
        return [(path.name, _state_to_show(path)) for path in newest_first]

    def made_at(self, path: Path) -> int | None:
        """When the run of that folder was made, in nanoseconds; None if the folder is not a job's."""
        if path.name.startswith(".") or path.is_symlink() or not (path / STATE).is_file():
            return None
        return (path / SPEC_FILE).stat().st_mtime_ns if (path / SPEC_FILE).is_file() else None

    def exports_of(self, path: Path) -> list[Path]:
        """The model files that a run wrote; empty until it is done."""
        spec = _spec_of(path) if _state_to_show(path).status == "done" else None
        exporting = spec is not None and EXPORTING & dict(spec.stages).keys()
        return model_files_in(path / "exports") if exporting else []

    def prepare(self, kind: str, stages, upstream: str = "", **options) -> Prepared:
        """The run that does these (stage, settings) pairs on the files of `upstream`. options: other
        fields of its JobSpec.

        If the run exists and is done, running or queued, it is returned. If it failed, was cancelled or
        lost its worker, another attempt is made that goes on from its files. A new request starts with
        what is still valid of earlier runs of its kind (`seed_from_sibling`). Raises ValueError for an
        unknown stage or setting, and for an upstream that is not done.
        """
        stages = tuple((stage, dict(settings)) for stage, settings in stages)
        spec = JobSpec(
            stages=stages, upstream=upstream, identity=self._identity(stages, upstream), **options
        )
        return self._prepare(_base(kind, spec.identity), spec)

    def again(self, name: str) -> Prepared:
        """Another attempt of a run that failed or was cancelled; the run itself if it is done or
        running."""
        match = ATTEMPT.fullmatch(name)
        return self._prepare(match[1] if match else name, read_spec(self.path(name)))

    def derive(
        self, kind: str, upstream: str, write: Callable[[Path], None], identity_of: dict
    ) -> Path:
        """A run without a job, done at once: the upstream's files, and what `write(folder)` adds.

        Called again with the same upstream and `identity_of`, it returns the run that exists. `write`
        may overwrite .json files; the upstream's other files are hard links, so it has to replace them
        as `atomic.replacing` does.
        """
        before = self._identity_of_run(upstream) if upstream else ""
        identity = _hash({"upstream": before, **identity_of})
        base, spec = _base(kind, identity), JobSpec(stages=(), upstream=upstream, identity=identity)
        while not (made := _same_request(attempts := self._attempts(base), identity)):
            with self._filling() as folder:
                if upstream:
                    seed_from_upstream(self._finished(upstream), folder, spec, None)
                write(folder)
                if upstream:
                    _drop_parts_of_another_plan(self.path(upstream), folder)
                write_spec(folder, spec)
                write_state(folder, JobState(status="done"))
                self._publish(folder, _next_name(base, attempts))
        return made[-1]

    def start(self, path: Path) -> Process | None:
        """Launches the worker; returns None if one is running already. Raises ValueError for a run that
        has ended."""
        path = self.path(Path(path).name)
        state = read_state(path)
        is_running = not state.is_final and state.pid is not None and not is_abandoned(state)
        return None if is_running else launch(path, read_spec(path).outlive)

    def _prepare(self, base: str, spec: JobSpec) -> Prepared:
        # unknown stages and settings are refused before anything is written
        configs(spec, self.root / base)
        while True:
            attempts = self._attempts(base)
            newest = (_same_request(attempts, spec.identity) or [None])[-1]
            if newest is not None:
                state = settle(newest)
                if state.status not in ("failed", "cancelled"):
                    return Prepared(newest, state.status == "queued" and state.pid is None)
            name = _next_name(base, attempts)
            with self._filling() as folder:
                self._fill(folder, base, spec, newest)
                if self._publish(folder, name):
                    if newest is not None:
                        clear_scratch(newest)
                    return Prepared(self.root / name, True)

    def _fill(self, folder: Path, base: str, spec: JobSpec, newest: Path | None) -> None:
        write_spec(folder, spec)
        if newest is not None:
            append_event(
                folder, "continued", run=newest.name, finished=finished_stages(read_events(newest))
            )
            seed_attempt(newest, folder)
        else:
            if spec.upstream:
                made_with = self._stage_settings(spec.upstream, "distill-depth")
                seed_from_upstream(self._finished(spec.upstream), folder, spec, made_with)
            for sibling, its_spec in self._siblings(base):
                seed_from_sibling(sibling, folder, spec, its_spec)
        write_state(folder, JobState(status="queued", stages=len(spec.stages)))

    def _siblings(self, base: str) -> Iterator[tuple[Path, JobSpec]]:
        """Runs of the same kind with their specs, newest first."""
        kind = base.rpartition("-")[0]
        for name, _ in self.names():
            match = ATTEMPT.fullmatch(name)
            if (
                match
                and match[1].rpartition("-")[0] == kind
                and (spec := _spec_of(self.root / name))
            ):
                yield self.root / name, spec

    def _attempts(self, base: str) -> dict[int, Path]:
        """Number -> path of everything that is named like an attempt of `base`, by number."""
        attempts = {}
        for path in self._entries():
            match = re.fullmatch(re.escape(base) + r"(?:-([1-9][0-9]*))?", path.name)
            if match:
                attempts[int(match[1] or 1)] = path
        return dict(sorted(attempts.items()))

    def _entries(self) -> list[Path]:
        return list(self.root.iterdir()) if self.root.is_dir() else []

    def _finished(self, name: str) -> Path:
        path = self.path(name)
        if (path / STATE).exists() and (state := current_state(path)).status != "done":
            raise ValueError(
                f"run {name} {state.in_words}; a new run can only start from one that is done"
            )
        return path

    def _identity(self, stages: tuple[tuple[str, dict], ...], upstream: str) -> str:
        spec = JobSpec(stages=stages)
        rows = [[stage, _marked(config)] for stage, config in configs(spec, self.root / "run")]
        return _hash(
            {"stages": rows, "upstream": self._identity_of_run(upstream) if upstream else ""}
        )

    def _identity_of_run(self, name: str) -> str:
        """The identity in its spec; of a recording, the hash of its content."""
        path = self.path(name)
        if (path / SPEC_FILE).exists() and (identity := read_spec(path).identity):
            return identity
        if (path / CALIBRATION).is_file():
            return sha256_of(path / CALIBRATION)
        raise ValueError(
            f"run {name} has neither a {SPEC_FILE} nor a recording; choose another run"
        )

    def _stage_settings(self, name: str, stage: str) -> dict | None:
        """The settings with which the stage was last done, in this run or the nearest upstream; None if
        none of them did it."""
        while name and (self.path(name) / SPEC_FILE).exists():
            spec = read_spec(self.path(name))
            done_with = [settings for done, settings in spec.stages if done == stage]
            if done_with:
                return done_with[-1]
            name = spec.upstream
        return None

    @contextmanager
    def _filling(self) -> Iterator[Path]:
        """A new folder to fill, deleted afterwards unless it was published; forgotten ones are deleted
        too."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob(f"{UNFINISHED}*"):
            # another caller may publish or delete its folder at this moment
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > FORGOTTEN:
                    shutil.rmtree(left, ignore_errors=True)
        folder = self.root / f"{UNFINISHED}{secrets.token_hex(6)}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, folder: Path, name: str) -> bool:
        """Gives the folder its name. False if another caller has taken the name first."""
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


def _same_request(attempts: dict[int, Path], identity: str) -> list[Path]:
    """The attempts at exactly this request: another one may have the same eight digits in its name."""
    folders = [path for path in attempts.values() if path.is_dir() and not path.is_symlink()]
    specs = [(path, _spec_of(path)) for path in folders]
    return [path for path, spec in specs if spec and spec.identity == identity]


def _next_name(base: str, attempts: dict[int, Path]) -> str:
    number = max(attempts, default=0) + 1
    return base if number == 1 else f"{base}-{number}"


def _spec_of(path: Path) -> JobSpec | None:
    """None if it cannot be read, or is of another version."""
    try:
        spec = read_spec(path)
        configs(spec, path)
    except ValueError:
        return None
    return spec


def _state_to_show(path: Path) -> JobState:
    try:
        return current_state(path)
    except ValueError as error:
        return JobState(status="failed", error=str(error))


def _hash(values: dict) -> str:
    return hashlib.sha256(json_text(values, sort_keys=True, default=str).encode()).hexdigest()


def _marked(config) -> dict:
    """The settings that decide the results. A file or folder counts by its name, sizes and times of
    change, not by where it is."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in SAME_BITS}
    return {name: [v.name, _mark(v)] if isinstance(v, Path) else v for name, v in values.items()}


def _mark(path: Path) -> list:
    """[path in the folder, size, time of change] of each file; empty if there is none."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [[str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _drop_parts_of_another_plan(upstream: Path, folder: Path) -> None:
    """Deletes projections and polished parts if the plan has changed: they are fitted to all its
    intervals and sites together."""
    before, now = (_parts_of_plan(path / "plan.json") for path in (upstream, folder))
    if before != now:
        for name in ("width", "polished"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _parts_of_plan(path: Path) -> tuple | None:
    if not path.exists():
        return None
    plan = plan_from_value(read_json(path), path)
    return plan.sites, [(interval.first, interval.last) for interval in plan.intervals]
