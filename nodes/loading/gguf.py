"""Models in GGUF, the base of a bundle or a pruned model by itself. ComfyUI-GGUF reads and runs them,
if that pack is installed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import nodes as host_nodes

from ..host.modulations import OFF
from ..paths import GGUF
from .request import Request

LOADER = "UnetLoaderGGUF"


@dataclass(frozen=True, eq=False)
class LoadedFile:
    """Tensors that another pack has loaded, with the methods of an open file."""

    path: Path
    tensors: dict[str, torch.Tensor]
    """in that pack's own form"""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def is_installed() -> bool:
    return LOADER in host_nodes.NODE_CLASS_MAPPINGS


def files_last(names: list[str]) -> list[str]:
    """What a loader offers of these files: those in GGUF last, and only if they can be read."""
    in_gguf = [name for name in names if name.endswith(GGUF)]
    others = [name for name in names if not name.endswith(GGUF)]
    return [*others, *in_gguf] if is_installed() else others


def is_needed(request: Request, weight_dtype: str) -> bool:
    """Whether the model or its base is in GGUF. Raises ValueError for settings that such a file does
    not support."""
    file = next(
        (path for path in (request.path, request.base) if path is not None and path.suffix == GGUF),
        None,
    )
    if file is None:
        return False
    if weight_dtype != "default" or (file == request.base and not request.switchable):
        raise ValueError(f"{file.name} is GGUF: set switchable to on and weight_dtype to default")
    if request.fold != OFF:
        raise ValueError(f"{file.name} is GGUF, whose modulations can't be folded; set fold to off")
    return True


def pack():
    """ComfyUI-GGUF's module, with its loader, operations and patcher. Raises ValueError if that pack
    is not installed."""
    if not is_installed():
        raise ValueError(
            "a model in GGUF needs ComfyUI-GGUF; install that node pack, or choose a .safetensors file"
        )
    return sys.modules[host_nodes.NODE_CLASS_MAPPINGS[LOADER].__module__]


def open_base(path: Path) -> dict[str, tuple[LoadedFile, str]]:
    """A GGUF file as `open_layout` gives others. Raises ValueError, in one line, for a file that is
    damaged or not a diffusion model."""
    read = pack().gguf_sd_loader
    try:
        loaded = read(str(path))
    except Exception as error:  # another pack's reader: a file that is cut off ends it in many ways
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"ComfyUI-GGUF cannot read {path.name} ({said}): it is cut off, or not a diffusion model; copy or download it again"
        ) from error
    tensors = loaded[0] if isinstance(loaded, tuple) else loaded  # newer versions return a tuple
    file = LoadedFile(path, tensors)
    return {name: (file, name) for name in tensors}


def model_options() -> dict:
    return {"custom_operations": pack().GGMLOps()}


def patched(model):
    """The host's patcher turned into that pack's own."""
    return pack().GGUFModelPatcher.clone(model)
