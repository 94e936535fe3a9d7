"""A base model in GGUF, read and run by ComfyUI-GGUF when that pack is there."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import nodes as host_nodes

ENDING = ".gguf"
LOADER = "UnetLoaderGGUF"


@dataclass(frozen=True, eq=False)
class LoadedFile:
    """Tensors that another pack holds, read as those of a file are."""

    tensors: dict[str, torch.Tensor]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def pack():
    """The module of ComfyUI-GGUF with its loader, operations and patcher. Raises ValueError where it is not installed."""
    node = host_nodes.NODE_CLASS_MAPPINGS.get(LOADER)
    if node is None:
        raise ValueError(
            "a base model in GGUF needs ComfyUI-GGUF; install that node pack, or choose a .safetensors file"
        )
    return sys.modules[node.__module__]


def open_base(path: Path) -> dict[str, tuple[LoadedFile, str]]:
    """As `open_layout` gives a file."""
    found = pack().gguf_sd_loader(str(path))
    tensors = found[0] if isinstance(found, tuple) else found  # newer ones give more beside it
    file = LoadedFile(tensors)
    return {name: (file, name) for name in tensors}


def model_options() -> dict:
    return {"custom_operations": pack().GGMLOps()}


def patched(model):
    """The host's patcher as that pack needs it."""
    return pack().GGUFModelPatcher.clone(model)
