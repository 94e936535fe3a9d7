"""Tar shards as webdataset lays them out: neighbouring files of one name, each with an ending of its
own, are a sample.

Read and written with the standard library: the format is plain tar, shards are read in order here, and
the webdataset package would bring decoders that unpickle.
"""

from __future__ import annotations

import io
import itertools
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..system.atomic import replacing

MOST_SHARDS = 100_000
LARGEST = 1 << 30  # bytes of a file in a shard
RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
BRACES = re.compile(r"\{([^{}]*)\}")

Sample = dict[str, bytes]
"""ending, without its dot -> content"""


def shard_files(pattern: str) -> list[Path]:
    """The files that a pattern such as data/{00..99}.tar or {a,b}.tar names, in its order. Raises
    ValueError where any of them is missing."""
    paths = [Path(name) for name in itertools.islice(_expanded(pattern), MOST_SHARDS + 1)]
    if len(paths) > MOST_SHARDS:
        raise ValueError(f"--shards {pattern} names more than {MOST_SHARDS:,} files; name fewer")
    absent = [path for path in paths if not path.is_file()]
    if len(absent) == len(paths):
        raise ValueError(
            f"--shards {pattern} matches no file; name tar files, as 'data/{{00..99}}.tar'"
        )
    if absent:
        raise ValueError(
            f"{absent[0]} does not exist ({len(absent)} of {len(paths)} shards of {pattern} are missing)"
        )
    return paths


def _expanded(pattern: str) -> Iterator[str]:
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    for choice in _choices(match[1]):
        yield from _expanded(pattern[: match.start()] + choice + pattern[match.end() :])


def _choices(inside: str) -> Iterable[str]:
    """ "00..03" or "a,b": a shell's rules, without steps and letters."""
    bounds = RANGE.fullmatch(inside)
    if bounds is None:
        return inside.split(",")
    digits, numbers = len(bounds[1]), range(int(bounds[1]), int(bounds[2]) + 1)
    return (f"{number:0{digits}d}" for number in numbers)


def samples(paths: Iterable[Path]) -> Iterator[tuple[str, Sample]]:
    """(shard and name, files) of every sample, read from the shards one after the other. Raises
    ValueError naming a shard that is broken."""
    for path in paths:
        files = ((f"{path}, {_stem(name)}", name, content) for name, content in _files(path))
        for where, group in itertools.groupby(files, key=lambda file: file[0]):
            yield where, {_ending(name): content for _, name, content in group}


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file in a shard; hidden files are left out."""
    try:
        with tarfile.open(path, "r|*") as shard:
            for member in shard:
                if not member.isfile() or Path(member.name).name.startswith("."):
                    continue
                if member.size > LARGEST:
                    raise ValueError(f"{path}: {member.name[:80]!r} has {member.size:,} bytes")
                content = shard.extractfile(member)
                assert content is not None  # of a file
                yield member.name, content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = " ".join(str(error).split()) or "it ends too early"
        raise ValueError(
            f"{path} is not a whole tar file ({reason}); write or download it again"
        ) from None


def _stem(name: str) -> str:
    """The name up to the first dot after its folders."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _ending(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def write_shard(path: Path, rows: Iterable[tuple[str, Sample]]) -> None:
    """Writes (name, files) of samples. The same samples give the same bytes."""
    with (
        replacing(path) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as shard,
    ):
        for name, sample in rows:
            for ending, content in sample.items():
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
