"""Where a full model's tensors are: in shards or one file, under the prefixes that other tools add
to names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from ..system.atomic import read_object
from ..system.gguf_files import GGUFFile, is_gguf
from ..system.json_text import NotJSON, json_text, parse_json, shown
from ..system.pickled_files import PickledFile
from ..system.tensor_files import TensorFile, check_exists

COMFYUI_PREFIX = "model.diffusion_model."
PREFIXES = (COMFYUI_PREFIX, "diffusion_model.", "transformer.", "net.", "module.", "_orig_mod.")
"""added by checkpoints, trainers, wrappers for several processes and torch.compile; in any order"""
COMPILED = "_orig_mod."  # also before the names of a single block
MOST_SHARDS = 10_000
LONGEST_NAME = 255
STRUCTURE_TENSOR = "ppcl_structure"
# JSON: the teacher's blocks that a file has, for readers that drop metadata
HINTS_TENSOR = "ppcl_hints"
LONGEST_TEXT = 10_000_000  # bytes of a plan in a tensor; one for 60 blocks has about ten thousand
OpenFile = TensorFile | PickledFile | GGUFFile
StoredTensors = Mapping[str, tuple[OpenFile, str]]
"""a tensor's name -> file, name in it"""


def open_layout(path: Path) -> tuple[StoredTensors, dict | None]:
    """(key -> (file, name in it), configuration or None), without the prefixes that checkpoints and
    training tools add."""
    check_exists(path)
    if path.is_dir():
        return _open_folder(transformer_folder(path))
    file = GGUFFile(path) if is_gguf(path) else TensorFile(path)
    names = stripped_names(file.keys(), path)
    stored = {ours: (file, name) for ours, name in names.items()}
    return stored, config_of(file) or hints_in(stored).get("config")


def config_of(file: TensorFile | GGUFFile) -> dict | None:
    """The configuration in a file's metadata, if any. Raises ValueError for one that is not an
    object."""
    text = file.metadata.get("config")
    if text is None:
        return None
    try:
        config = parse_json(text)
    except NotJSON as error:
        raise ValueError(
            f"{file.path}: its metadata's config is not JSON ({error}); restore the file"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"{file.path}: its metadata's config is not an object; restore the file")
    return config


def hints_in(stored: StoredTensors) -> dict:
    """What a file's hints tensor says: config, indices (teacher indices of its blocks), blocks (the
    teacher's number). Empty without one."""
    if HINTS_TENSOR not in stored:
        return {}
    file, name = stored[HINTS_TENSOR]
    return object_in(file.read(name), file.path)


def text_in(tensor: torch.Tensor) -> str:
    """The text that a tensor holds, one byte a value.

    GGUF has no bytes: tools that convert our files to it keep them exactly, as half-precision
    numbers. Raises ValueError for a tensor that does not hold text.
    """
    kept = tensor.dtype in (torch.uint8, torch.float16, torch.float32)
    if not kept or len(tensor.shape) != 1 or tensor.shape[0] > LONGEST_TEXT:
        raise ValueError(f"a text is stored as bytes in a row, at most {LONGEST_TEXT:,}")
    try:
        return bytes(map(int, tensor.tolist())).decode()
    except OverflowError:  # an infinite number
        raise ValueError("a text is stored as bytes") from None


def object_in(tensor: torch.Tensor, where: object) -> dict:
    """A JSON object stored as bytes. Raises ValueError, in one line, for anything else."""
    try:
        value = parse_json(text_in(tensor))
    except ValueError:  # neither text nor JSON
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: what it says of its own blocks is not readable; export or save it again"
        )
    return value


def as_tensor(value: dict | str) -> torch.Tensor:
    """A JSON object, or its text, as a tensor, which hosts keep where they drop metadata."""
    return torch.tensor(
        list((value if isinstance(value, str) else json_text(value)).encode()), dtype=torch.uint8
    )


def common_prefix(names: Iterable[str]) -> str:
    """All prefixes before a transformer's names, such as "model.diffusion_model._orig_mod."; other
    tensors of a checkpoint do not have it."""
    common, names = "", list(names)
    while prefix := next((p for p in PREFIXES if any(name.startswith(p) for name in names)), None):
        common += prefix
        names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return common


def stripped_names(names: Iterable[str], where: object) -> dict[str, str]:
    """A transformer's name -> the name as stored. Raises ValueError where two stored names become
    the same."""
    names, stored_names = list(names), {}
    prefix = common_prefix(names)
    for name in names:
        if name.startswith(prefix):
            ours = name.removeprefix(prefix).replace(COMPILED, "")
            if ours in stored_names:
                raise ValueError(
                    f"{where}: {shown(stored_names[ours])} and {shown(name)} are the same tensor; remove one of the two"
                )
            stored_names[ours] = name
    return stored_names


def transformer_folder(path: Path) -> Path:
    """The transformer's folder in a diffusers pipeline folder, or the folder itself."""
    return path / "transformer" if (path / "model_index.json").exists() else path


def _open_folder(path: Path) -> tuple[StoredTensors, dict]:
    if not (path / "config.json").exists():
        raise ValueError(
            f"{path} has no config.json; give a diffusers transformer or pipeline folder"
        )
    config = {k: v for k, v in read_object(path / "config.json").items() if not k.startswith("_")}
    stored: dict[str, tuple[OpenFile, str]] = {}
    for shard in shards_of(path):
        file = PickledFile(shard) if shard.suffix == ".bin" else TensorFile(shard)
        for name in file.keys():
            if name in stored:
                raise ValueError(
                    f"{path}: {shown(name)} is in {stored[name][0].path.name} and in {shard.name}; remove one of the two files"
                )
            stored[name] = file, name
    _check_index(path, stored)
    return {ours: stored[name] for ours, name in stripped_names(stored, path).items()}, config


def _check_index(path: Path, stored: Mapping[str, object]) -> None:
    """Raises ValueError for an index that names a tensor which its files do not hold."""
    for ending in (".safetensors", ".bin"):
        for index in sorted(path.glob(f"*{ending}.index.json"))[:1]:
            names = read_object(index).get("weight_map") or {}
            if missing := sorted(set(names) - set(stored)):
                raise ValueError(
                    f"{index} names {len(missing)} tensors that its files do not hold, first {shown(missing[0])}; "
                    "download the folder again"
                )
            return


def files_of(path: Path) -> list[Path]:
    """The files with a model's tensors: its own file, or those of its folder."""
    check_exists(path)
    return shards_of(transformer_folder(path)) if path.is_dir() else [path]


def shards_of(path: Path) -> list[Path]:
    """The files that hold a folder's tensors; safetensors where there are both kinds."""
    for ending in (".safetensors", ".bin"):
        for index in sorted(path.glob(f"*{ending}.index.json")):
            return _listed(path, index)
        if shards := sorted(p for p in path.glob(f"*{ending}") if not p.name.startswith(".")):
            return shards
    raise ValueError(f"{path} has no .safetensors or .bin file; download its weights")


def _listed(path: Path, index: Path) -> list[Path]:
    """The shards of an index, all inside the folder. Raises ValueError naming the index and what is
    wrong with it."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ValueError(
            f"{index}: weight_map is missing or not file names by tensor; download it again"
        )
    names = sorted(set(weight_map.values()))
    if not names or len(names) > MOST_SHARDS:
        raise ValueError(f"{index}: weight_map names {len(names):,} files; download it again")
    for name in names:
        _check_inside(path, name, index)
        if not (path / name).exists():
            raise ValueError(
                f"{path} lacks the shard {shown(name)} that {index.name} lists; download it again"
            )
    return [path / name for name in names]


def _is_below(file: Path, folder: Path) -> bool:
    """Whether the file is in the folder. In a snapshot of huggingface_hub's cache, files of the
    same model count too: `models--x/snapshots/y` is full of links to `models--x/blobs`."""
    blobs = [p.parent / "blobs" for p in folder.parents if p.name == "snapshots"]
    return file.is_relative_to(folder) or file.parent in blobs


def _check_inside(folder: Path, name: str, index: Path) -> None:
    """Links included: a downloaded folder must not be able to name its reader's files."""
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    plain = (
        0 < len(name) <= LONGEST_NAME
        and name.isprintable()
        and not PurePosixPath(name).is_absolute()
        and not PureWindowsPath(name).drive
    )
    inside = plain and ".." not in parts and not re.match(r"[/\\]", name)
    if inside and (folder / name).exists():
        inside = _is_below(Path(os.path.realpath(folder / name)), Path(os.path.realpath(folder)))
    if not inside or not name.endswith((".safetensors", ".bin")):
        raise ValueError(
            f"{index}: {name[:80]!r} is not a file of weights in its folder, so it is not opened; download the folder again"
        )
