"""Which of a file's tensors make a weight of few bits, and whether this host reads it. A scale that
nobody would use is an
error: without it the weights are noise."""

from __future__ import annotations

import json
from collections.abc import Mapping

import comfy.quant_ops
import torch

from ...ppcl_engine.models.stored_layout import COMFYUI_PREFIX
from ...ppcl_engine.system.float8 import FP8_MARK
from .quantised import (
    FLOAT8,
    FORMAT,
    HOST,
    IN_FILE,
    INPUT_SCALE,
    OLD_NAMES,
    ONE_SCALE,
    SCALE,
    SCALES,
    Quantised,
    read_settings,
)

METADATA = "_quantization_metadata"
NEW_NAMES = {old: new for new, old in OLD_NAMES.items()}
COMPANIONS = {FORMAT, *SCALES, *NEW_NAMES}
NEEDED = (SCALE, "weight_scale_2")  # where a format has them
PACKED = (torch.int8, torch.uint8)
FOREIGN = {
    ".absmax": "bitsandbytes",
    ".qweight": "SVDQuant or GPTQ",
    ".weight_scale_inv": "float8 in blocks",
}
ELSEWHERE = "take the model in another format"


def float8_of(mark: torch.Tensor) -> torch.dtype:
    """What a scaled file keeps matrices in: its mark says it by its own precision."""
    return mark.dtype if mark.dtype in FLOAT8 else torch.float8_e4m3fn


def layers_in(metadata: Mapping[str, str], where: str) -> dict[str, dict]:
    """Layer -> settings, as a file's metadata has them. Raises ValueError where it can't be
    read."""
    try:
        layers = json.loads(metadata.get(METADATA, '{"layers": {}}'))["layers"]
        return {str(name).removeprefix(COMFYUI_PREFIX): dict(said) for name, said in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{where}: its {METADATA} is not readable; copy or download the file again"
        ) from None


def grouped(
    places: Mapping,
    where: str,
    layers: Mapping[str, dict] | None = None,
    old: torch.dtype | None = None,
) -> dict:
    """The places of a file's tensors (`.shape`, `.dtype`, `.read()`), every matrix of few bits as
    one `Quantised`. layers: what the file's metadata says; old: of a scaled fp8 file whose mark is
    not among the tensors. Raises ValueError, in one line, for a format that this host does not
    read, and for a matrix of 8 bits or fewer without the scale that it needs."""
    found, companions = _by_module(places, NEW_NAMES)
    mark = places[FP8_MARK].read() if FP8_MARK in places else None
    old = old if mark is None else float8_of(mark)
    exact = {"full_precision_matrix_mult": True} if mark is not None and mark.numel() == 2 else {}
    for module in {**companions, **dict.fromkeys(layers or ())}:
        parts, weight = companions.get(module, {}), found.get(f"{module}.weight")
        if weight is None and not parts:
            continue  # the metadata names more than the transformer's
        said = _said(parts.pop(FORMAT, None), (layers or {}).get(module), f"{where}: {module}")
        marked = old if said is None else None
        if marked is not None or said and said["format"] in FLOAT8.values():
            # hosts take any scaled fp8 file for one of float8_e4m3fn: the weight itself says it
            kind = (
                FLOAT8.get(getattr(weight, "dtype", None)) or FLOAT8[marked or torch.float8_e4m3fn]
            )
            said = {**(said or exact), "format": kind}
        check_matrix(weight, parts, said, marked, f"{where}: {module}.weight")
        found[f"{module}.weight"] = Quantised({"weight": weight, **parts}, said, marked)
    for name, place in found.items():
        _check_plain(name, place, where)
    return found


def passed_on(places: Mapping) -> dict:
    """As `grouped`, for a model on another pack's operations: nothing is checked, and nothing
    changes."""
    found, companions = _by_module(places, {})
    for module, parts in companions.items():
        if weight := found.get(f"{module}.weight"):
            found[f"{module}.weight"] = Quantised({"weight": weight, **parts})
    return found


def _by_module(places: Mapping, new_names: Mapping[str, str]) -> tuple[dict, dict[str, dict]]:
    """(all but what belongs to a weight, module -> leaf -> what belongs to its weight)"""
    found, companions = {}, {}
    for name, place in places.items():
        module, _, leaf = name.rpartition(".")
        if leaf in COMPANIONS and module:
            companions.setdefault(module, {})[new_names.get(leaf, leaf)] = place
        else:
            found[name] = place
    return found, companions


def _said(place, said: dict | None, where: str) -> dict | None:
    try:
        said = said if place is None else read_settings(place.read())
        return said and {**said, "format": str(said["format"])}
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{where}.{FORMAT} is not readable; copy or download the file again"
        ) from None


def check_matrix(
    weight, parts: Mapping, said: dict | None, old: torch.dtype | None, where: str
) -> None:
    """Raises ValueError, in one line, where this host would read it wrong. where: file and name."""
    if weight is None:
        raise ValueError(f"{where} has a scale and is not there; copy or download the file again")
    if said is None:
        raise ValueError(
            f"{where} has a scale, and nothing in the file says its format (no {FORMAT}, no {FP8_MARK}); {ELSEWHERE}"
        )
    if old is not None and not IN_FILE:
        known = {"storage_t": old, "parameters": {SCALE}}
    else:
        check_format(said["format"], where)
        known = comfy.quant_ops.QUANT_ALGOS[said["format"]]
    stored = f"{where} is stored as {said['format']}"
    kinds = PACKED if known["storage_t"] in PACKED else (known["storage_t"],)
    if weight.dtype not in kinds or len(weight.shape) != 2:
        kind = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"{stored} and holds {kind} of shape {tuple(weight.shape)}; {ELSEWHERE}")
    if missing := [leaf for leaf in NEEDED if leaf in known["parameters"] and leaf not in parts]:
        raise ValueError(f"{stored} and lacks its {missing[0]}; copy or download the file again")
    if unused := sorted(parts.keys() - known["parameters"] - {INPUT_SCALE}):
        raise ValueError(f"{stored}, which does not use its {unused[0]}; {ELSEWHERE}")
    if said["format"] in FLOAT8.values() and tuple(parts[SCALE].shape) not in ONE_SCALE:
        raise ValueError(
            f"{stored} with scales of shape {tuple(parts[SCALE].shape)}, {HOST} reads one scale; {ELSEWHERE}"
        )


def check_format(name: str, where: str) -> None:
    """Raises ValueError, in one line, for a format that this host does not read."""
    known = comfy.quant_ops.QUANT_ALGOS
    if name not in known:
        raise ValueError(
            f"{where.partition(':')[0]}: its weights are stored as {name}, which {HOST} does not read; {ELSEWHERE} "
            f"(scaled fp8, {', '.join(sorted(known))}), or a newer ComfyUI"
        )


def _check_plain(name: str, place, where: str) -> None:
    for ending, kind in FOREIGN.items():
        if name.endswith(ending):
            check_format(kind, where)
    matrix = name.endswith(".weight") and len(place.shape) == 2 and not isinstance(place, Quantised)
    if matrix and place.dtype in PACKED:
        kind = str(place.dtype).removeprefix("torch.")
        raise ValueError(f"{where}: {name} is stored in {kind} without a scale; {ELSEWHERE}")
