"""Where model files are: the only code that asks the host for folders. The text of a widget is looked
up in a list, never joined to a path."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import folder_paths

from ..ppcl_engine.jobs.store import RunStore
from ..ppcl_engine.models.bundle import BUNDLE_SUFFIX
from ..ppcl_engine.system.atomic import replacing
from .listing import Contents, changed_at, contents_of, guarded, remembered

CATEGORY = "ppcl"
GGUF = ".gguf"
# the last is ComfyUI-GGUF's, if that pack is installed
CATEGORIES = (CATEGORY, "diffusion_models", "unet_gguf")
LORAS = "loras"
ADAPTED_LORAS = "ppcl"  # folder in it
ENDINGS = (".safetensors", GGUF)
TABLES = "tables"  # in models/ppcl: a cache of folded modulations
DEMO = Path(__file__).parents[1] / "ppcl_engine" / "demo"
RUNS = "ppcl"  # in the output folder
EXPORTS = "exports"  # in a run
NO_FOLDER = NO_BASE = "none"
DEMO_FILES = {
    "demo/demo.ppcl.safetensors": "demo.ppcl.safetensors",
    "demo/teacher.safetensors": "teacher.safetensors",
}


def register() -> None:
    """Tells the host of models/ppcl, for bundles and for released folders as they are downloaded."""
    folder_paths.add_model_folder_path(CATEGORY, str(Path(folder_paths.models_dir) / CATEGORY))


def contents_under(category: str, endings: tuple[str, ...]) -> Contents:
    """The contents of all folders of one of the host's categories. Of two files with one name the
    first counts. `endings`: used if the category itself names none."""
    roots, known = folder_paths.folder_names_and_paths.get(category, ((), ()))
    wanted = tuple(sorted(known)) or endings
    return _joined(tuple(contents_of(Path(root), wanted) for root in roots))


@lru_cache(maxsize=16)
def _joined(parts: tuple[Contents, ...]) -> Contents:
    files, models, shards = {}, {}, set()
    for part in parts:
        shards |= part.shards - files.keys()
        files, models = {**part.files, **files}, {**part.models, **models}
    return Contents(dict(sorted(files.items())), dict(sorted(models.items())), frozenset(shards))


def model_files() -> dict[str, Path]:
    """Name in a combo -> path: files and diffusers folders in models/ppcl and
    models/diffusion_models, the demo's own files (a file of the same name in models/ppcl/demo is
    used instead), and what finished jobs exported."""
    return {
        **_named(tuple(contents_under(category, ENDINGS) for category in CATEGORIES)),
        **exported_files(),
    }


@lru_cache(maxsize=4)
def _named(parts: tuple[Contents, ...]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for part in parts:
        files = (
            n
            for n in part.files
            if n.endswith(ENDINGS) and n not in part.shards and Path(n).parts[0] != TABLES
        )
        named = {**named, **{name: part.files[name] for name in files if name not in named}}
        named = {**named, **{name: path for name, path in part.models.items() if name not in named}}
    demo = {
        name: DEMO / file
        for name, file in DEMO_FILES.items()
        if name not in named and (DEMO / file).exists()
    }
    return {**named, **demo}


def files_of_the_engine() -> list[str]:
    """Names of the model files that the engine reads by itself; GGUF needs another node pack."""
    return [name for name in model_files() if not name.endswith(GGUF)]


def runs() -> RunStore:
    return RunStore(Path(folder_paths.get_output_directory()) / RUNS)


@dataclass(frozen=True)
class Seen:
    """What is known of an entry in the folder of runs."""

    made: int | None = None
    """when, in nanoseconds; None: it is not a run"""
    files: tuple[Path, ...] = ()
    """that it exported"""


_seen: dict[Path, tuple] = {}


def _runs_seen() -> dict[Path, Seen]:
    """All runs by their folders, newest first. An entry that cannot be read is left out."""
    root = runs().root
    there = guarded(root, None, root.is_dir, False)
    entries = guarded(root, changed_at(root), lambda: list(root.iterdir()), []) if there else []
    seen = {}
    for entry in entries:
        times = (changed_at(entry), changed_at(entry / EXPORTS))
        look = partial(guarded, entry, times, partial(_look_at_run, entry), Seen())
        seen[entry] = remembered(_seen, entry, times, look)
    for entry in _seen.keys() - seen.keys():
        del _seen[entry]
    return dict(
        sorted(
            ((e, s) for e, s in seen.items() if s.made), key=lambda row: row[1].made, reverse=True
        )
    )


def _look_at_run(folder: Path) -> Seen:
    store = runs()
    made = store.made_at(folder)
    files = store.exports_of(folder) if made else []
    return Seen(made, tuple(file for file in files if _is_inside(file, store.root)))


def run_names() -> list[str]:
    """Names of the runs of jobs, newest first."""
    return [folder.name for folder in _runs_seen()]


def exported_files() -> dict[str, Path]:
    """ "runs/<run>/<file>" -> path. Links that lead out of the folder of runs are left out."""
    root = runs().root
    return {
        exported_name(file, root): file for seen in _runs_seen().values() for file in seen.files
    }


def exported_name(file: Path, root: Path | None = None) -> str:
    run, _, *rest = file.relative_to(root or runs().root).parts
    return "/".join(("runs", run, *rest))


def teacher_files() -> list[str]:
    """Names of files that may be full models, the demo's first. Whether one is, the job that reads
    it finds out."""
    names = [
        name
        for name in model_files()
        if name.endswith((".safetensors", "/")) and not name.startswith("runs/")
    ]
    return sorted(
        (n for n in names if not n.endswith(BUNDLE_SUFFIX)), key=lambda name: name not in DEMO_FILES
    )


def known_model(path: Path, run: str) -> Path:
    """The listed model that a path in a run's files leads to, maybe through links. Raises ValueError
    for a path to anything that no combo offers."""
    known = next(
        (file for file in model_files().values() if file.resolve() == path.resolve()), None
    )
    if known is None:
        raise ValueError(
            f"{path.name}, the model of run {run}, is neither in models/ppcl nor in models/diffusion_models; put it back there"
        )
    return known


def model_path(name: str) -> Path:
    """Raises ValueError for a name that is not in the list."""
    files = model_files()
    if name not in files:
        raise ValueError(
            f"{name[:200]!r} is neither in models/ppcl nor in models/diffusion_models; refresh, then choose again"
        )
    return files[name]


def base_path(name: str) -> Path | None:
    """None if no base model is chosen. Raises ValueError for a name that is not in the list."""
    return None if name == NO_BASE else model_path(name)


def written_folder() -> Path:
    """models/ppcl: where folded files go."""
    return Path(folder_paths.get_folder_paths(CATEGORY)[0])


def tables_folder() -> Path:
    """Where folded modulations are cached; its files may be deleted at any time."""
    return written_folder() / TABLES


def picture_folders() -> list[str]:
    """Names of folders in the host's input folder. Links that lead out of it are left out."""
    root = Path(folder_paths.get_input_directory())
    entries = (
        guarded(root, changed_at(root), lambda: sorted(root.iterdir()), []) if root.is_dir() else []
    )
    return [
        e.name
        for e in entries
        if guarded(e, None, lambda e=e: e.is_dir() and _is_inside(e, root), False)
    ]


def _is_inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def picture_folder(name: str) -> Path:
    """Raises ValueError for a name that is not in the list."""
    if name not in picture_folders():
        raise ValueError(
            f"{name!r} is not a folder in ComfyUI's input folder; refresh, then choose again"
        )
    return Path(folder_paths.get_input_directory()) / name


def references_folder(name: str) -> Path | None:
    """None if no folder is chosen. Raises ValueError for a name that is not in the list."""
    return None if name == NO_FOLDER else picture_folder(name)


def demo_teacher() -> Path:
    return DEMO / "teacher.safetensors"


def lora_files() -> list[str]:
    return list(contents_under(LORAS, ("",)).files)


def adapted_lora(run: str, file: Path) -> str:
    """Copies the adapted LoRA of a run to where the host's loaders list LoRAs, under `ppcl/`; returns
    its name in their lists. The run's own name keeps it apart from other runs'."""
    name = f"{ADAPTED_LORAS}/{run}-{file.name}"
    target = Path(folder_paths.get_folder_paths(LORAS)[0]) / name
    if not (target.exists() and target.stat().st_size == file.stat().st_size):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as unfinished:
            shutil.copyfile(file, unfinished)
    return name


def lora_path(name: str) -> Path:
    """Raises ValueError for a name that is not in the list."""
    path = contents_under(LORAS, ("",)).files.get(name)
    if path is None:
        raise ValueError(f"{name!r} is not in models/loras; refresh, then choose again")
    return path
