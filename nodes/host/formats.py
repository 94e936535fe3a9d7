"""Which of a file's tensors make up a quantised weight, and whether this host reads its format.

A scale that nothing would use is an error: without it the weights are noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import comfy.quant_ops
import torch

from ...ppcl_engine.models.standalone import GUARD_SHAPE
from ...ppcl_engine.models.stored_layout import COMFYUI_PREFIX
from ...ppcl_engine.system.float8 import FP8_MARK
from .quantised import (
    FLOAT8,
    FORMAT,
    GROUPED,
    HOST,
    IN_FILE,
    INPUT_SCALE,
    NOT_LISTED,
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
NEEDED = (SCALE, "weight_scale_2", *GROUPED)  # of these, a weight needs those that its format has
PACKED = (torch.int8, torch.uint8)
FOREIGN = {
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qweight": "SVDQuant or GPTQ",
    ".weight_scale_inv": "float8 in blocks",
    ".weight._data": "Quanto",
    ".W_q": "HQQ",
}
ELSEWHERE = "use the model in another format"


def float8_of(mark: torch.Tensor) -> torch.dtype:
    """The dtype of the matrices of a scaled fp8 file, which is that of the file's mark."""
    return mark.dtype if mark.dtype in FLOAT8 else torch.float8_e4m3fn


def layers_in(metadata: Mapping[str, str], where: str) -> dict[str, dict]:
    """Layer -> settings of its format, from a file's metadata. Raises ValueError if they cannot be
    read."""
    try:
        layers = json.loads(metadata.get(METADATA, '{"layers": {}}'))["layers"]
        return {str(name).removeprefix(COMFYUI_PREFIX): dict(said) for name, said in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{where}: its {METADATA} is not readable; copy or download the file again"
        ) from None


def grouped(
    locations: Mapping,
    where: str,
    layers: Mapping[str, dict] | None = None,
    old: torch.dtype | None = None,
) -> dict:
    """The locations of a file's tensors by name, where a quantised matrix and its scales are one
    `Quantised`.

    locations: objects with `.shape`, `.dtype` and `.read()`; layers: formats that the file's metadata
    gives; old: dtype of the matrices of a scaled fp8 file whose mark is not among the tensors.
    Raises ValueError, in one line, for a format that this host does not read, and for a matrix of 8
    bits or fewer without the scale that it needs.
    """
    refuse_foreign(locations, where)
    by_name, companions = _by_module(locations, NEW_NAMES)
    mark = locations[FP8_MARK].read() if FP8_MARK in locations else None
    old = old if mark is None else float8_of(mark)
    exact = {"full_precision_matrix_mult": True} if mark is not None and mark.numel() == 2 else {}
    for module in {**companions, **dict.fromkeys(layers or ())}:
        parts, weight = companions.get(module, {}), by_name.get(f"{module}.weight")
        if weight is None and not parts:
            continue  # the metadata names layers of other models in the file too
        said = _said(parts.pop(FORMAT, None), (layers or {}).get(module), f"{where}: {module}")
        marked = old if said is None else None
        if marked is not None or said and said["format"] in FLOAT8.values():
            # by the weight's own dtype: hosts name any scaled fp8 file float8_e4m3fn
            kind = (
                FLOAT8.get(getattr(weight, "dtype", None)) or FLOAT8[marked or torch.float8_e4m3fn]
            )
            said = {**(said or exact), "format": kind}
        check_matrix(weight, parts, said, marked, f"{where}: {module}.weight")
        by_name[f"{module}.weight"] = Quantised({"weight": weight, **parts}, said, marked)
    for name, location in by_name.items():
        _check_plain(name, location, where)
    return by_name


def passed_on(locations: Mapping) -> dict:
    """As `grouped`, for a model on another pack's operations, which knows its own formats: nothing
    is checked."""
    by_name, companions = _by_module(locations, {})
    for module, parts in companions.items():
        if weight := by_name.get(f"{module}.weight"):
            by_name[f"{module}.weight"] = Quantised({"weight": weight, **parts})
    return by_name


def _by_module(locations: Mapping, new_names: Mapping[str, str]) -> tuple[dict, dict[str, dict]]:
    """Divides locations into (all others by name, scales and formats: module -> leaf -> location)."""
    others, companions = {}, {}
    for name, location in locations.items():
        module, _, leaf = name.rpartition(".")
        if leaf in COMPANIONS and module:
            companions.setdefault(module, {})[new_names.get(leaf, leaf)] = location
        else:
            others[name] = location
    return others, companions


def _said(location, said: dict | None, where: str) -> dict | None:
    try:
        said = said if location is None else read_settings(location.read())
        return said and {**said, "format": str(said["format"])}
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{where}.{FORMAT} is not readable; copy or download the file again"
        ) from None


def check_matrix(
    weight, parts: Mapping, said: dict | None, old: torch.dtype | None, where: str
) -> None:
    """Raises ValueError, in one line, for a matrix that this host would read wrongly. where: the
    file and the tensor, for that message."""
    if weight is None:
        raise ValueError(
            f"{where} is missing, though its scale is there; copy or download the file again"
        )
    if said is None:
        raise ValueError(
            f"{where} has a scale, but nothing in the file names its format (no {FORMAT}, no {FP8_MARK}); {ELSEWHERE}"
        )
    if old is not None and not IN_FILE:
        known = {"storage_t": old, "parameters": {SCALE}}
    else:
        check_format(said["format"], where)
        known = comfy.quant_ops.QUANT_ALGOS[said["format"]]
        known = {**known, "parameters": NOT_LISTED.get(said["format"], known["parameters"])}
    stored = f"{where} is stored as {said['format']}"
    kinds = PACKED if known["storage_t"] in PACKED else (known["storage_t"],)
    if weight.dtype not in kinds or len(weight.shape) != 2:
        kind = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"{stored} but holds {kind} of shape {tuple(weight.shape)}; {ELSEWHERE}")
    if missing := [leaf for leaf in NEEDED if leaf in known["parameters"] and leaf not in parts]:
        raise ValueError(f"{stored} but lacks its {missing[0]}; copy or download the file again")
    if unused := sorted(parts.keys() - known["parameters"] - {INPUT_SCALE}):
        raise ValueError(f"{stored}, which does not use its {unused[0]}; {ELSEWHERE}")
    if said["format"] in FLOAT8.values() and tuple(parts[SCALE].shape) not in ONE_SCALE:
        raise ValueError(
            f"{stored} with scales of shape {tuple(parts[SCALE].shape)}, but {HOST} reads a single scale; {ELSEWHERE}"
        )


def check_format(name: str, where: str) -> None:
    """Raises ValueError, in one line, for a format that this host does not read."""
    known = comfy.quant_ops.QUANT_ALGOS
    if name not in known:
        raise ValueError(
            f"{where.partition(':')[0]}: its weights are stored as {name}, which {HOST} does not read; {ELSEWHERE} "
            f"(scaled fp8, {', '.join(sorted(known))}), or a newer ComfyUI"
        )


def refuse_foreign(names: Iterable[str], where: str) -> None:
    """Raises ValueError that names the format, for formats that no ComfyUI reads by itself: their
    tensors have names of their own."""
    for name in names:
        for ending, kind in FOREIGN.items():
            if name.endswith(ending):
                check_format(kind, where)


def _check_plain(name: str, location, where: str) -> None:
    matrix = (
        name.endswith(".weight")
        and len(location.shape) == 2
        and tuple(location.shape) != GUARD_SHAPE
        and not isinstance(location, Quantised)
    )
    if matrix and not location.dtype.is_floating_point:
        kind = str(location.dtype).removeprefix("torch.")
        raise ValueError(f"{where}: {name} is stored in {kind} without a scale; {ELSEWHERE}")
