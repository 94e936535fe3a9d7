"""Where model files are: the only code that asks the host for folders. A widget's text is looked up, never joined."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..ppcl_engine.bundle import BUNDLE_SUFFIX
from ..ppcl_engine.jobs.store import RunStore

CATEGORY = "ppcl"
CATEGORIES = (CATEGORY, "diffusion_models", "unet_gguf")  # the last is ComfyUI-GGUF's, where that pack is
ENDINGS = (".safetensors", ".gguf")
TABLES = "tables"  # in models/ppcl: values of folded modulations, made when they are first needed
DEMO = Path(__file__).parents[1] / "ppcl_engine" / "demo"
RUNS = "ppcl"  # in the output folder
EXPORTS = "exports"  # in a run
NO_FOLDER = "none"
DEMO_FILES = {"demo/demo.ppcl.safetensors": "demo.ppcl.safetensors", "demo/teacher.safetensors": "teacher.safetensors"}


def register() -> None:
    """models/ppcl: bundles, and released folders as they were downloaded."""
    folder_paths.add_model_folder_path(CATEGORY, str(Path(folder_paths.models_dir) / CATEGORY))


def model_files() -> dict[str, Path]:
    """Name in a combo -> path: files of models/ppcl and models/diffusion_models, diffusers folders in either, the demo's
    own files (one of the same name in models/ppcl/demo goes before), what done jobs exported."""
    found: dict[str, Path] = {}
    for category in CATEGORIES:
        if category not in folder_paths.folder_names_and_paths:
            continue
        for name in folder_paths.get_filename_list(category):
            path = folder_paths.get_full_path(category, name)
            if Path(name).parts[0] == TABLES:
                continue
            if path and name.endswith(ENDINGS) and not _inside_model_folder(Path(path)):
                found.setdefault(name, Path(path))
        for root in map(Path, folder_paths.get_folder_paths(category)):
            for config in sorted(root.glob("*/config.json")) + sorted(root.glob("*/model_index.json")):
                found.setdefault(f"{config.parent.name}/", config.parent)
    for name, file in DEMO_FILES.items():
        if (DEMO / file).exists():
            found.setdefault(name, DEMO / file)
    return {**found, **exported_files()}


def runs() -> RunStore:
    return RunStore(Path(folder_paths.get_output_directory()) / RUNS)


def exported_files() -> dict[str, Path]:
    """ "runs/<run>/<file>" -> path; what a link leads out of the folder of runs is left."""
    store = runs()
    files = [file for file in store.exports() if file.resolve().is_relative_to(store.root)]
    return {exported_name(file): file for file in files}


def exported_name(file: Path) -> str:
    run, _, *rest = file.relative_to(runs().root).parts
    return "/".join(("runs", run, *rest))


def teacher_files() -> list[str]:
    """Names of models that may be full ones, the demo's first; the job that reads one says whether it is."""
    names = [name for name in model_files() if name.endswith((".safetensors", "/")) and not name.startswith("runs/")]
    return sorted((n for n in names if not n.endswith(BUNDLE_SUFFIX)), key=lambda name: name not in DEMO_FILES)


def known_model(path: Path, run: str) -> Path:
    """A path that a run's files name, as a combo would give it; a link may lead there another way. Raises ValueError
    for one that no combo gives."""
    found = next((file for file in model_files().values() if file.resolve() == path.resolve()), None)
    if found is None:
        raise ValueError(f"{path.name}, the model of run {run}, is in none of models/ppcl and models/diffusion_models")
    return found


def model_path(name: str) -> Path:
    """Raises ValueError for a name that is not in the list."""
    files = model_files()
    if name not in files:
        raise ValueError(
            f"{name[:200]!r} is in none of models/ppcl and models/diffusion_models; refresh, then choose again"
        )
    return files[name]


def written_folder() -> Path:
    """models/ppcl: where folded files go."""
    return Path(folder_paths.get_folder_paths(CATEGORY)[0])


def tables_folder() -> Path:
    """Its files may be removed at any time; they are made again."""
    return written_folder() / TABLES


def picture_folders() -> list[str]:
    """Names of folders in the host's input folder; what a link leads out of it is left."""
    root = Path(folder_paths.get_input_directory()).resolve()
    return sorted(path.name for path in root.glob("*/") if path.is_dir() and path.resolve().is_relative_to(root))


def picture_folder(name: str) -> Path:
    """Raises ValueError for a name that is not in the list."""
    if name not in picture_folders():
        raise ValueError(f"{name!r} is no folder in ComfyUI's input folder; refresh, then choose again")
    return Path(folder_paths.get_input_directory()) / name


def demo_teacher() -> Path:
    return DEMO / "teacher.safetensors"


def lora_files() -> list[str]:
    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> Path:
    """Raises ValueError for a name that is not in the list."""
    path = folder_paths.get_full_path("loras", name) if name in lora_files() else None
    if path is None:
        raise ValueError(f"{name!r} is not in models/loras; refresh, then choose again")
    return Path(path)


def _inside_model_folder(path: Path) -> bool:
    """A shard: its folder is the model."""
    return any((path.parent / name).exists() for name in ("config.json", "model_index.json"))
