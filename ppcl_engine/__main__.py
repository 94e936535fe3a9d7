"""The command line: `ppcl STAGE --settings`, `ppcl run FILE`."""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial
from pathlib import Path

from .settings import assess_settings, base_settings
from .stages import STAGES, run_stage

TINY = "tiny"  # a table of a run file: what --tiny puts in the place of the real model
USER_ERROR, INTERRUPTED = 2, 130
_ADVICE = "nothing half-written was left; free space, or choose a folder that can be written"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    from .system.distributed import leave

    return leave(_code(arguments))


def _code(arguments: list[str]) -> int:
    """The exit code. What went wrong is said in one line."""
    from .system.distributed import tell
    from .system.interruption import Stopped

    try:
        _dispatch(arguments[0], arguments[1:])
    except Stopped as stopped:
        tell(f"\nppcl: {stopped}")
        return INTERRUPTED
    except KeyboardInterrupt:
        tell("\nppcl: stopped; run the same command to go on")
        return INTERRUPTED
    except ValueError as error:
        tell(f"ppcl: {error}")
        return USER_ERROR
    except OSError as error:
        tell(f"ppcl: {error.filename}: {os.strerror(error.errno or 0)}; {_ADVICE}")
        return USER_ERROR
    return 0


def _dispatch(stage: str, arguments: list[str]) -> None:
    import tyro

    from .system.distributed import is_main

    parse = partial(tyro.cli, args=arguments, prog=f"ppcl {stage}", console_outputs=is_main())
    if stage == "run":
        config = parse(assess_settings.RunConfig, config=(tyro.conf.PositionalRequiredArgs,))
        run_file(config.file, config.tiny)
        return
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; known: {', '.join([*STAGES, 'run'])}")
    kind, _ = STAGES[stage]
    run_stage(stage, parse(kind))


def run_file(path: Path, tiny: bool = False) -> None:
    """Every table is read and checked before the first stage starts."""
    stages = read_run_file(path)
    if tiny:
        from .demo.tiny import tiny_run

        stages = tiny_run(path.stem, _tables(path).get(TINY, {}), stages)
    for stage, config in stages:
        run_stage(stage, config)


def read_run_file(path: Path) -> list[tuple[str, object]]:
    """Raises ValueError naming file, table and setting."""
    tables = {name: table for name, table in _tables(path).items() if name != TINY}
    common = tables.pop("common", {})
    unknown = [name for name in tables if name not in STAGES]
    if unknown:
        raise ValueError(f"{path}: unknown stage [{unknown[0]}]; known: {', '.join(STAGES)}")
    return [
        (
            stage,
            base_settings.from_mapping(STAGES[stage][0], {**common, **table}, f"{path} [{stage}]"),
        )
        for stage, table in tables.items()
    ]


def _tables(path: Path) -> dict[str, dict]:
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a TOML file")
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return toml.loads(path.read_text(encoding="utf-8"))
    except toml.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None


def _usage() -> str:
    lines = [f"  {name:14} {kind.__doc__.splitlines()[0]}" for name, (kind, _) in STAGES.items()]
    lines.append(f"  {'run':14} {assess_settings.RunConfig.__doc__}")
    return "usage: ppcl STAGE [settings]; ppcl STAGE --help lists them\n\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
