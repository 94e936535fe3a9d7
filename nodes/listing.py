"""Lists what folders of models contain: files, and folders that are a model each. Knows nothing of
ComfyUI.

A list is made whatever the folders contain: what cannot be read is left out, and the log says so
once.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..ppcl_engine.system.atomic import read_json

DEEPEST = 12  # levels of folders below a root; a hub cache has 6
MOST_FOLDERS = 10_000  # below a root
# visits to one real folder, through links: links to each other would otherwise make an endless tree
MOST_WAYS = 4
LARGEST_CONFIG = 1_000_000  # bytes; a transformer's configuration has less than two thousand
# nanoseconds: a file system may give the same time to two changes that follow each other faster
SETTLED = 2 * 10**9
CONFIG, PIPELINE, TRANSFORMER = "config.json", "model_index.json", "transformer"

Stat = tuple[int, int]
"""(time of the last change in nanoseconds, size)"""


@dataclass(frozen=True, eq=False)
class Contents:
    """What was found below a root."""

    files: dict[str, Path] = field(default_factory=dict)
    """"folder/name.safetensors", with the system's separators -> path"""
    models: dict[str, Path] = field(default_factory=dict)
    """"folder/" -> path of a diffusers folder"""
    shards: frozenset[str] = frozenset()
    """those of the files that lie beside the configuration of a model"""


@dataclass(frozen=True)
class Listing:
    """The contents of a root at one time."""

    contents: Contents
    made: int
    """when, in nanoseconds"""
    changed: dict[Path, int]
    """every folder that was walked -> when its entries had last changed"""

    @property
    def is_current(self) -> bool:
        """Adding or removing an entry changes the time of its folder. A folder that had just changed
        when the list was made may have changed again within the same time."""
        settled = max(self.changed.values(), default=0) < self.made - SETTLED
        return settled and all(changed_at(folder) == at for folder, at in self.changed.items())


@dataclass(frozen=True)
class Folder:
    """A folder on the walk below a root."""

    path: Path
    above: tuple[Path, ...]
    """the real folders from the root down to this one, which is the last"""
    in_pipeline: bool = False
    """whether it is a component of a diffusers pipeline"""

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return len(self.above) - 1


_listings: dict[tuple[Path, tuple[str, ...]], Listing] = {}
_told: dict[object, object] = {}


def tell_once(about: object, state: object, text: str) -> None:
    """Logs the text; once, until the state of what it is about has changed."""
    if about not in _told or _told[about] != state:
        _told[about] = state
        logging.warning("ComfyUI-PPCL: %s", " ".join(text.split())[:500])


def guarded(
    of: Path, state: object, look: Callable, otherwise, what: str = "is left out of the lists"
):
    """The result of `look`, or, if it fails, `otherwise`; the log then says why."""
    try:
        return look()
    # any file may lie there, and an error while a list is made would take our nodes from the host
    except Exception as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        tell_once((of, what), state, f"{of} {what}: {said}")
        return otherwise


def remembered(memory: dict, key: object, times: tuple[int, ...], make: Callable):
    """The result of `make`, kept as long as these times of change stay the same. It is made anew
    while the last change is so recent that another may have gone unnoticed."""
    known = memory.get(key)
    if known is None or known[0] != times or max(times) >= known[1] - SETTLED:
        known = memory[key] = (times, time.time_ns(), make())
    return known[2]


def stat_of(path: Path) -> Stat | None:
    """None if it does not exist or cannot be seen."""
    try:
        stat = path.stat()
    except (OSError, ValueError):  # ValueError: this system has no such names
        return None
    return stat.st_mtime_ns, stat.st_size


def changed_at(folder: Path) -> int:
    stat = stat_of(folder)
    return stat[0] if stat else 0


def contents_of(root: Path, endings: tuple[str, ...]) -> Contents:
    """Files with these endings, and models, below a root. The root is walked again when one of its
    folders has changed."""
    key = (root, endings)
    if key not in _listings or not _listings[key].is_current:
        made, changed = time.time_ns(), {}
        contents = guarded(root, None, lambda: _walked(root, endings, changed), Contents())
        _listings[key] = Listing(contents, made, changed)
    return _listings[key].contents


def _walked(root: Path, endings: tuple[str, ...], changed: dict[Path, int]) -> Contents:
    files, models, shards = {}, {}, set()
    for folder, entries in _folders(root, changed):
        below, names = folder.path.relative_to(root), {entry.name for entry in entries}
        wanted = (entry for entry in entries if entry.name.lower().endswith(endings))
        here = {str(below / e.name): e for e in wanted if guarded(e, None, e.is_file, False)}
        files |= here
        if folder.depth and names & {CONFIG, PIPELINE}:
            shards |= here.keys()
        if _is_model(folder, names):
            models[f"{below.as_posix()}/"] = folder.path
    return Contents(files, models, frozenset(shards))


def _is_model(folder: Folder, names: set[str]) -> bool:
    """Whether a folder is a pipeline or a transformer. Directly below a root any folder with a
    configuration counts, since somebody put it there as a model; further down there are text
    encoders and others too."""
    if not folder.depth or folder.in_pipeline or not names & {CONFIG, PIPELINE}:
        return False
    if folder.depth == 1 or PIPELINE in names:
        return folder.depth == 1 or TRANSFORMER in names
    config = folder.path / CONFIG
    return guarded(config, stat_of(config), lambda: _is_of_transformer(config), False)


def _is_of_transformer(config: Path) -> bool:
    if not config.is_file():
        raise ValueError("it is not a regular file")
    if config.stat().st_size > LARGEST_CONFIG:
        raise ValueError(
            f"{config.stat().st_size:,} bytes are too many for the configuration of a model"
        )
    values = read_json(config)
    return isinstance(values, dict) and TRANSFORMER in str(values.get("_class_name")).lower()


def _folders(root: Path, changed: dict[Path, int]) -> Iterator[tuple[Folder, list[Path]]]:
    """The root and every folder below it, each with its entries. Links are followed, but not in
    circles."""
    if not root.is_dir():
        return
    waiting, ways = deque([Folder(root, (root.resolve(),))]), Counter()
    while waiting:
        folder = waiting.popleft()
        if len(changed) == MOST_FOLDERS:
            tell_once(
                root,
                None,
                f"{root} has more than {MOST_FOLDERS:,} folders; those beyond are not listed",
            )
            return
        changed[folder.path] = changed_at(folder.path)
        entries = guarded(
            folder.path, changed[folder.path], lambda path=folder.path: sorted(path.iterdir()), []
        )
        yield folder, entries
        if folder.depth < DEEPEST:
            for below in _below(folder, entries):
                ways[below.above[-1]] += 1
                if ways[below.above[-1]] <= MOST_WAYS:
                    waiting.append(below)


def _below(folder: Folder, entries: list[Path]) -> list[Folder]:
    in_pipeline = folder.depth > 0 and any(entry.name == PIPELINE for entry in entries)
    real_paths = [
        guarded(entry, None, lambda entry=entry: _real(folder, entry), None) for entry in entries
    ]
    return [
        Folder(entry, (*folder.above, real), in_pipeline)
        for entry, real in zip(entries, real_paths, strict=True)
        if real and real not in folder.above
    ]


def _real(folder: Folder, entry: Path) -> Path | None:
    """The real path of a folder; None for anything else, and for a hidden folder (.git, .cache)."""
    if entry.name.startswith(".") or not entry.is_dir():
        return None
    return entry.resolve() if entry.is_symlink() else folder.above[-1] / entry.name
