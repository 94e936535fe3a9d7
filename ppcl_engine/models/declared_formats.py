"""The formats that a file declares for its layers: a `comfy_quant` tensor beside each weight, or the
metadata's `_quantization_metadata`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..system.few_bits import FORMAT_LEAF
from ..system.json_text import NotJSON, parse_json, shown
from .stored_layout import PREFIXES, StoredTensors

FORMAT_SUFFIX = f".{FORMAT_LEAF}"
FORMATS_KEY = "_quantization_metadata"


def declared_formats(
    stored: StoredTensors, metadata: Mapping[str, str], where: Path
) -> dict[str, dict]:
    """Layer -> its declared format and settings; only layers that exist, whatever prefix the
    metadata gives them. Raises ValueError for what is not JSON."""
    declared = {}
    for name, (file, key) in stored.items():
        if name.endswith(FORMAT_SUFFIX):
            text = bytes(file.read(key).reshape(-1).view(torch.uint8).tolist())
            declared[name.removesuffix(FORMAT_SUFFIX)] = _object(text, f"{where}: {shown(name)}")
    layers = (
        _object(metadata[FORMATS_KEY], f"{where}: {FORMATS_KEY}").get("layers")
        if FORMATS_KEY in metadata
        else {}
    )
    if not isinstance(layers, dict) or not all(
        isinstance(about, dict) for about in layers.values()
    ):
        raise ValueError(
            f"{where}: {FORMATS_KEY}: its layers are not JSON objects; download the file again"
        )
    ours = {
        key.removesuffix(".weight"): name.removesuffix(".weight")
        for name, (_, key) in stored.items()
    }
    by_layer = {ours.get(name, _bare(name)): about for name, about in layers.items()}
    there = {layer: a for layer, a in by_layer.items() if f"{layer}.weight" in stored} | declared
    return {layer: {**_more(about), **about} for layer, about in there.items()}


def _more(about: dict) -> dict:
    """Settings that some files have one level deeper."""
    inner = about.get("params")
    return inner if isinstance(inner, dict) else {}


def _bare(layer: str) -> str:
    """Without the prefixes that checkpoints and trainers put before a transformer's names."""
    while prefix := next((p for p in PREFIXES if layer.startswith(p)), None):
        layer = layer.removeprefix(prefix)
    return layer


def _object(text: str | bytes, where: str) -> dict:
    try:
        value = parse_json(text)
    except NotJSON as error:
        raise ValueError(f"{where}: not JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object; download the file again")
    return value
