"""Opens any file that holds a model: the model itself, or only its architecture and
configuration."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..architectures import ARCHITECTURES, Architecture, architecture_named
from ..architectures.folded import FOLDING
from ..architectures.modules import AnyModule
from ..system.atomic import read_object
from ..system.tensor_files import check_exists
from .assembly import assemble, empty_model, open_variant
from .bundle import Bundle
from .bundle_contents import check_bundle
from .filling import fill
from .folding.reading import give_base
from .kinds import Kind, kind_of
from .layout import full_layout
from .model_configs import check_model_config
from .released import Released, repeated_steps_warning
from .standalone import open_standalone, standalone_structure
from .streaming import block_loader
from .weights import Weights


def model_config(model: Path) -> tuple[str, Architecture, dict]:
    """(name, architecture, configuration) for the name of a known model, a folder with a
    config.json, or a model file."""
    for architecture in ARCHITECTURES:
        if str(model) in architecture.model_configs:
            return str(model), architecture, architecture.model_configs[str(model)]
    for folder in (model / "transformer", model):
        if (folder / "config.json").exists():
            return _from_config_file(model, read_object(folder / "config.json"))
    if model.is_file():
        return model.name, *_of_file(model)
    known = ", ".join(name for a in ARCHITECTURES for name in a.model_configs)
    raise ValueError(
        f"--model {model}: no such file, no folder with a config.json, and not one of {known}"
    )


def _of_file(model: Path) -> tuple[Architecture, dict]:
    if structure := standalone_structure(model):
        return architecture_named(structure["architecture"]), structure["config"]
    if kind_of(model) is Kind.BUNDLE:
        raise ValueError(
            f"{model} is a bundle: students only; give the base model it was made from as --base"
        )
    weights = Weights(model)
    return weights.architecture, weights.config


def _from_config_file(model: Path, values: dict) -> tuple[str, Architecture, dict]:
    for architecture in ARCHITECTURES:
        if values.get("_class_name") == architecture.diffusers_class:
            config = {k: v for k, v in values.items() if not k.startswith("_")}
            return (
                model.name,
                architecture,
                check_model_config(architecture.name, config, model / "config.json"),
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
    streamed: bool = False,
) -> nn.Module:
    """A model with the same forward as diffusers' class of its architecture.

    path: a bundle (then `base` is the teacher it was made from), one of our standalone files or
    folders, a diffusers folder, one of the authors' width-pruned folders, a ComfyUI single file.
    variant: a name of the bundle's plan, "full", or intervals and sites as "3-4,8-10,text:51-59";
    None is the smallest. base: for a folded table also the file that it was folded from, for
    timesteps that it lacks. legacy_txt_proj: the authors' older meaning of a text projection (see
    `released`). streamed: blocks of the full model are read from its file when they are called and
    dropped afterwards, so that any model fits into little memory; students of a bundle stay in
    memory. Raises ValueError in one line; so does the model's save_pretrained, where diffusers
    could not load what it writes.
    """
    model = _opened(
        Path(path), variant, Path(base) if base else None, dtype, device, legacy_txt_proj, streamed
    )
    if streamed or not _is_stock(model):
        model.save_pretrained = partial(_refuse_to_save, Path(path), streamed)
    return model


def _is_stock(model: AnyModule) -> bool:
    """Whether diffusers' class builds exactly these tensors from the model's configuration."""
    if FOLDING in model.config:
        return False
    with torch.device("meta"):
        stock = type(model).from_config(model.config).state_dict()
    ours = model.state_dict()
    return stock.keys() == ours.keys() and all(
        ours[name].shape == tensor.shape for name, tensor in stock.items()
    )


def _refuse_to_save(path: Path, streamed: bool, *arguments, **named) -> None:
    if streamed:
        raise ValueError(
            f"{path} was opened streamed, so the model has no blocks of its own to save; leave streamed out"
        )
    raise ValueError(
        f"{path} is pruned or folded, which diffusers' classes cannot load, so save_pretrained would write a folder that "
        "nothing reads; use `ppcl export --layout diffusers` (variants without corrections and width sites), or keep the file"
    )


def _opened(
    path: Path,
    variant: str | None,
    base: Path | None,
    dtype: torch.dtype,
    device: str,
    legacy_txt_proj: bool,
    streamed: bool,
) -> AnyModule:
    check_exists(path)
    kind = kind_of(path)
    if legacy_txt_proj and kind is not Kind.RELEASED:
        raise ValueError(
            f"{path} is not one of the authors' width-pruned folders, so --legacy-txt-proj has no effect; leave it out"
        )
    if kind is not Kind.BUNDLE:
        if variant is not None:
            raise ValueError(
                f"{path} is not a bundle, so it has no variant {variant!r}; leave the variant out"
            )
        if streamed and (kind is not Kind.FULL or base is not None):
            raise ValueError(
                f"{path} has no streamed form, which full models and bundles have; leave streamed out"
            )
        if kind is Kind.RELEASED:
            return _open_released(Released(path, legacy_txt_proj), dtype, device)
        if structure := standalone_structure(path):
            return _with_base(open_standalone(path, structure, dtype, device), base, path)
        weights = Weights(path)
        load = block_loader(weights, dtype, device, streamed)
        return _with_base(
            assemble(weights, None, full_layout(weights.num_blocks), dtype, device, load),
            base,
            path,
        )
    if base is None:
        raise ValueError(
            f"{path} is a bundle: students only; give the base model it was made from as well"
        )
    bundle, weights = Bundle(path), Weights(base)
    _check_folded_alike(bundle, weights)
    bundle.check_base(weights, base)
    check_bundle(bundle.file, bundle.plan)
    chosen = bundle.plan.variant(variant)
    if streamed and chosen.tuned:
        raise ValueError(
            f"variant {chosen.name!r} was fine-tuned as a whole, so no block of {base} could be streamed; leave streamed out"
        )
    load = block_loader(weights, dtype, device, streamed)
    return open_variant(weights, bundle, bundle.plan, chosen, dtype, device, load)


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
    """A folded table gets the timesteps that it lacks from the file that it was folded from."""
    if base is not None:
        give_base(model, Path(base), path)
    return model


def architecture_of(path: Path) -> Architecture:
    """The architecture of any file that `open_model` reads."""
    kind = kind_of(path)
    if kind is Kind.BUNDLE:
        return Bundle(path).architecture
    if kind is Kind.RELEASED:
        return Released(path).architecture
    structure = standalone_structure(path)
    return (
        architecture_named(structure["architecture"]) if structure else Weights(path).architecture
    )


def _open_released(released: Released, dtype: torch.dtype, device: str) -> nn.Module:
    if warning := repeated_steps_warning(released):
        warnings.warn(f"{released.path}: {warning}", stacklevel=3)
    model = empty_model(released.architecture, released.config, released.layout)
    return fill(model, released.read, dtype, device, released.path)
