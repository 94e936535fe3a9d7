"""Any file that holds a model, by its path: the model itself, or its architecture and configuration
alone."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from ..architectures import ARCHITECTURES, Architecture, architecture_named
from ..architectures.folded import FOLDING
from ..system.atomic import read_json
from ..system.tensor_files import check_exists
from .assembly import assemble, empty_model, filled, open_variant
from .bundle import Bundle, is_bundle
from .folding.files import give_base
from .layout import full_layout
from .released import Released, is_width_pruned, repeated_steps_warning
from .standalone import open_standalone, standalone_structure
from .weights import Weights


def model_config(model: Path) -> tuple[str, Architecture, dict]:
    """(name, architecture, configuration) of a known model's name, a folder with a config.json, or
    a model file."""
    for architecture in ARCHITECTURES:
        if str(model) in architecture.model_configs:
            return str(model), architecture, architecture.model_configs[str(model)]
    for folder in (model / "transformer", model):
        if (folder / "config.json").exists():
            return _from_config_file(model, read_json(folder / "config.json"))
    if structure := standalone_structure(model):
        return model.name, architecture_named(structure["architecture"]), structure["config"]
    if is_bundle(model):
        raise ValueError(
            f"{model} is a bundle: students only; give the base model it was made from as --base"
        )
    if model.is_file():
        weights = Weights(model)
        return model.name, weights.architecture, weights.config
    known = ", ".join(name for a in ARCHITECTURES for name in a.model_configs)
    raise ValueError(
        f"--model {model}: no such file, no folder with a config.json, and not one of {known}"
    )


def _from_config_file(model: Path, values: dict) -> tuple[str, Architecture, dict]:
    for architecture in ARCHITECTURES:
        if values.get("_class_name") == architecture.diffusers_class:
            return (
                model.name,
                architecture,
                {k: v for k, v in values.items() if not k.startswith("_")},
            )
    known = ", ".join(a.diffusers_class for a in ARCHITECTURES)
    raise ValueError(f"{model}: class {values.get('_class_name')!r} is unknown; known: {known}")


def open_model(
    path: str | Path,
    variant: str | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    legacy_txt_proj: bool = False,
) -> nn.Module:
    """A model with the same forward as diffusers' class of its architecture.

    path: a bundle (then `base` is the teacher it was made from), a standalone file or folder of
    ours, a diffusers folder, one of the authors' width-pruned folders, a ComfyUI single file.
    variant: a name of the bundle's plan, "full", or intervals and sites as "3-4,8-10,text:51-59";
    None is the smallest. base: also of a folded table, the file that it was folded from, for
    timesteps that it lacks.
    legacy_txt_proj: the authors' older meaning of a text projection (see `released`). Raises
    ValueError in one line.
    """
    path = Path(path)
    check_exists(path)
    if legacy_txt_proj and not is_width_pruned(path):
        raise ValueError(
            f"{path} is not one of the authors' width-pruned folders, so --legacy-txt-proj says nothing; leave it out"
        )
    if not is_bundle(path):
        if variant is not None:
            raise ValueError(
                f"{path} is not a bundle, so it has no variant {variant!r}; leave the variant out"
            )
        if is_width_pruned(path):
            return _open_released(Released(path, legacy_txt_proj), dtype, device)
        structure = standalone_structure(path)
        if structure:
            return _with_base(open_standalone(path, structure, dtype, device), base, path)
        weights = Weights(path)
        return _with_base(
            assemble(weights, None, full_layout(weights.num_blocks), dtype, device), base, path
        )
    if base is None:
        raise ValueError(
            f"{path} is a bundle: students only; give the base model it was made from as well"
        )
    bundle, weights = Bundle(path), Weights(base)
    _check_folded_alike(bundle, weights)
    bundle.plan.check_teacher(weights.architecture.name, weights.fingerprint, base)
    return open_variant(weights, bundle, bundle.plan, bundle.plan.variant(variant), dtype, device)


def _check_folded_alike(bundle: Bundle, weights: Weights) -> None:
    ours, theirs = (config.get(FOLDING) for config in (bundle.plan.config, weights.config))
    if ours != theirs:
        said = [
            f"folded ({folding['form']})" if folding else "not folded" for folding in (ours, theirs)
        ]
        raise ValueError(
            f"{bundle.file.path} is {said[0]}, {weights.path} is {said[1]}: they were not folded together; take the base that "
            "`ppcl fold` wrote beside the bundle, or the bundle and base as they were before"
        )


def _with_base(model: nn.Module, base: str | Path | None, path: Path) -> nn.Module:
    """A folded table gets what it lacks from the file that it was folded from."""
    if base is not None:
        give_base(model, Path(base), path)
    return model


def architecture_of(path: Path) -> Architecture:
    """Of any file that `open_model` reads."""
    if is_bundle(path):
        return Bundle(path).architecture
    if is_width_pruned(path):
        return Released(path).architecture
    structure = standalone_structure(path)
    return (
        architecture_named(structure["architecture"]) if structure else Weights(path).architecture
    )


def _open_released(released: Released, dtype: torch.dtype, device: str) -> nn.Module:
    if warning := repeated_steps_warning(released):
        warnings.warn(f"{released.path}: {warning}", stacklevel=3)
    return filled(
        empty_model(released.architecture, released.config, released.layout),
        released.read,
        dtype,
        device,
    )
