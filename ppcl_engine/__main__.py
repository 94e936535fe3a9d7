"""The command line: `ppcl STAGE --settings`, `ppcl run FILE`."""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds: Ctrl-C works at once
    from .system.early import watch

    watch()

import errno
import os
import sys
from pathlib import Path

from .settings import assess_settings, base_settings
from .settings.arguments import parse
from .settings.toml_files import read_tables
from .stages import STAGES, run_stage
from .system.early import INTERRUPTED, finish
from .system.memory_errors import is_lack_of_memory
from .system.wording import cut, known_names, one_line, shown

TINY = "tiny"  # table of a run file: the small teacher that --tiny uses instead of the model
USER_ERROR = 2
_ADVICE = {
    errno.ENOSPC: "free space; nothing half-written was left",
    errno.EDQUOT: "free space; nothing half-written was left",
    errno.ENAMETOOLONG: "give a shorter path",
}
MEMORY_ADVICE = "use --streamed, a smaller batch or smaller pictures, or see --dry-run"
_OTHER_ADVICE = (
    "give a path that can be read, or a folder that can be written; nothing half-written was left"
)


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        return _help()
    from .system.distributed import leave

    return leave(_code(arguments))


def _help() -> int:
    """Without torch, which takes seconds."""
    try:
        print(_usage(), flush=True)
    except BrokenPipeError:
        _drop_output()
    except OSError as error:
        print(f"ppcl: the help cannot be written: {_line(error)}", file=sys.stderr)
        _drop_output()
        return USER_ERROR
    return 0


def _drop_output() -> None:
    """What was not written yet would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _code(arguments: list[str]) -> int:
    """The exit code. Prints a mistake, or an interrupt, in one line."""
    from .system.distributed import tell
    from .system.interruption import Stopped
    from .system.progress import Progress

    try:
        _dispatch(arguments[0], arguments[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has read enough
        _drop_output()
        return 0
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        Progress.close_all()
        tell(f"ppcl: {arguments[0]} ran out of memory; {MEMORY_ADVICE}")
        return USER_ERROR
    except (Stopped, KeyboardInterrupt, ValueError, OSError) as error:
        Progress.close_all()
        tell(f"ppcl: {one_line(_line(error), arguments)}")
        return INTERRUPTED if isinstance(error, Stopped | KeyboardInterrupt) else USER_ERROR
    return 0


def _line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped; run the same command to go on"
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{os.strerror(error.errno)}; {_ADVICE.get(error.errno, _OTHER_ADVICE)}"
    return str(error)


def _dispatch(stage: str, arguments: list[str]) -> None:
    from .system.distributed import is_main

    if stage == "run":
        import tyro

        config = parse(
            assess_settings.RunConfig,
            stage,
            arguments,
            is_main(),
            config=(tyro.conf.PositionalRequiredArgs,),
        )
        run_file(config.file, config.tiny, config.dry_run)
        return
    if stage not in STAGES:
        raise ValueError(f"unknown stage {shown(stage)}; {known_names(stage, [*STAGES, 'run'])}")
    run_stage(stage, parse(STAGES[stage][0], stage, arguments, is_main()))


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
    for stage, config in stages:
        run_stage(stage, config)


def read_run_file(path: Path) -> list[tuple[str, object]]:
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


def _usage() -> str:
    lines = [
        f"  {name:14} {(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in STAGES.items()
    ]
    lines.append(f"  {'run':14} {assess_settings.RunConfig.__doc__}")
    return "usage: ppcl STAGE [settings]; ppcl STAGE --help lists them\n\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(finish(main()))
