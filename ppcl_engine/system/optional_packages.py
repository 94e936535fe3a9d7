"""Packages that only some files need. Without one, the error is a line that says how to get it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

EXTRA = "pip install 'ppcl[quantised]'"


def kitchen(needed_for: str) -> ModuleType:
    """comfy-kitchen: ComfyUI's formats of few bits. Raises ValueError, beginning with `needed_for`,
    where it is not installed."""
    return _imported("comfy_kitchen.tensor", "comfy-kitchen", needed_for)


def gguf(needed_for: str) -> ModuleType:
    """The same for gguf, which reads and writes GGUF files."""
    return _imported("gguf", "gguf", needed_for)


def _imported(module: str, name: str, needed_for: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        lacks = f" ({error.name} is missing)" if error.name not in (None, module, name) else ""
        raise ValueError(
            f"{needed_for} needs the package {name}{lacks}: {EXTRA}, or pip install {name}"
        ) from None
