"""The command line: `ppcl STAGE --settings`, `ppcl run FILE`."""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds: Ctrl-C works at once
    from .system.early import start

    start()

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .settings import assess_settings, base_settings
from .settings.arguments import parse
from .settings.help_pages import HELP, overview, page
from .settings.ranges import Settings
from .settings.toml_files import read_tables
from .stages import ROOMS, STAGES, room_of, run_stage
from .stages.next_steps import next_step
from .system.early import INTERRUPTED, finish
from .system.launch_environment import is_main
from .system.user_errors import USER_ERROR, drop_output, line_of
from .system.wording import cut, known_names, one_line, shown

RUN, TINY = "run", "tiny"
"""the command for run files, and the table there of the small teacher that --tiny uses"""


def main(arguments: list[str] | None = None) -> int:
    """The exit code. Help, and a mistake in the command line, come without torch, which takes
    seconds."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or HELP & set(arguments):
            return _print_help(arguments)
        work = _read(arguments[0], arguments[1:])
    except (KeyboardInterrupt, ValueError, OSError) as error:
        if is_main():
            print(f"ppcl: {one_line(line_of(error), arguments)}", file=sys.stderr, flush=True)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else USER_ERROR
    from .stages.command import code_of  # imports torch

    return code_of(work, arguments)


def _print_help(arguments: list[str]) -> int:
    """The page of the stage that is named, or the list of all stages. Returns the exit code."""
    named = [word for word in arguments if word not in HELP][:1]
    text = page(named[0], _settings_of(named[0])) if named else overview(ROOMS, _by_room())
    try:
        if is_main():
            print(text, flush=True)
    except BrokenPipeError:  # whoever read the output has read enough
        drop_output()
    except OSError as error:
        print(f"ppcl: the help cannot be written: {line_of(error)}", file=sys.stderr)
        drop_output()
        return USER_ERROR
    return 0


def _all_settings() -> dict[str, type]:
    return {stage: kind for stage, (kind, _) in STAGES.items()} | {RUN: assess_settings.RunConfig}


def _by_room() -> dict[str, dict[str, type]]:
    """Folder -> its stages and their settings."""
    stages = _all_settings()
    return {
        room: {name: kind for name, kind in stages.items() if room_of(name) == room}
        for room in ROOMS
    }


def _settings_of(stage: str) -> type:
    known = _all_settings()
    if stage not in known:
        raise ValueError(f"unknown stage {shown(stage)}; {known_names(stage, known)}")
    return known[stage]


def _read(stage: str, arguments: list[str]) -> Callable[[], None]:
    """What the command line asks for, to be done."""
    config = parse(_settings_of(stage), stage, arguments)
    if isinstance(config, assess_settings.RunConfig):
        return partial(run_file, config.file, config.tiny, config.dry_run)
    return partial(_run_all, [(stage, config)])


def _run_all(stages: Sequence[tuple[str, Settings]]) -> None:
    """Runs them in this order, then says what to run next."""
    result = None
    for stage, config in stages:
        result = run_stage(stage, config)
    if is_main() and (line := next_step(*stages[-1], result)):
        print(line, file=sys.stderr)


def run_file(path: Path, tiny: bool = False, dry_run: bool = False) -> None:
    """Runs the stages of a TOML file, or prints what they would take, after all of its tables were
    read and checked."""
    stages = read_run_file(path)
    if tiny:
        from .demo.tiny import tiny_run

        stages = tiny_run(path.stem, read_tables(path).get(TINY, {}), stages)
    if not stages:
        raise ValueError(f"{path} names no stage; add a table such as [calibrate]")
    if dry_run:
        from .estimate.dry_run import print_estimates

        print_estimates(stages)
        return
    _run_all(stages)


def read_run_file(path: Path) -> list[tuple[str, Settings]]:
    """(stage, settings) in the file's order. Raises ValueError naming file, table and setting."""
    tables = read_tables(path)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(
                f"{path}: {shown(name)} is not a table; write [{cut(name)}] and its settings below it"
            )
    common, _ = tables.pop("common", {}), tables.pop(TINY, {})
    unknown = [name for name in tables if name not in STAGES]
    if unknown:
        raise ValueError(
            f"{path}: unknown stage [{cut(unknown[0])}]; {known_names(unknown[0], STAGES)}"
        )
    return [
        (
            stage,
            base_settings.from_mapping(STAGES[stage][0], {**common, **table}, f"{path} [{stage}]"),
        )
        for stage, table in tables.items()
    ]


if __name__ == "__main__":
    sys.exit(finish(main()))
