"""Packages that only some files need. Without one, the error is a line that says how to get it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

EXTRA = "pip install 'ppcl[{}]'"


def kitchen(needed_for: str) -> ModuleType:
    """comfy-kitchen: ComfyUI's formats of few bits. Raises ValueError, beginning with `needed_for`,
    where it is not installed."""
    return _imported("comfy_kitchen.tensor", "comfy-kitchen", needed_for, "quantised")


def gguf(needed_for: str) -> ModuleType:
    """The same for gguf, which reads and writes GGUF files."""
    return _imported("gguf", "gguf", needed_for, "quantised")


def rapidocr(needed_for: str) -> ModuleType:
    """The same for rapidocr, which reads text in pictures, with onnxruntime, which runs it."""
    _imported("onnxruntime", "onnxruntime", needed_for, "ocr")
    return _imported("rapidocr", "rapidocr", needed_for, "ocr")


def transformers(needed_for: str) -> ModuleType:
    """The same for transformers."""
    return _imported("transformers", "transformers", needed_for, "text")


def _imported(module: str, name: str, needed_for: str, extra: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        lacks = f" ({error.name} is missing)" if error.name not in (None, module, name) else ""
        raise ValueError(
            f"{needed_for} needs the package {name}{lacks}: {EXTRA.format(extra)}, or pip install {name}"
        ) from None
