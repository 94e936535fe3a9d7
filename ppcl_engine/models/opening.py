"""Opens any file that holds a model: the model itself, or only its architecture and
configuration."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..architectures import ARCHITECTURES, Architecture
from ..architectures.folded import FOLDING
from ..architectures.modules import AnyModule
from ..system.atomic import read_object
from .assembly import assemble, open_variant
from .bundle import Bundle
from .bundle_contents import check_bundle
from .folding.reading import give_base
from .kinds import open_file
from .model_configs import check_model_config
from .released import Released, repeated_steps_warning
from .standalone import Standalone
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
    found = open_file(model)
    if isinstance(found, Bundle):
        raise ValueError(
            f"{model} is a bundle: students only; give the base model it was made from as --base"
        )
    return found.architecture, found.config


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
    path, base = Path(path), Path(base) if base else None
    found = open_file(path, legacy_txt_proj)
    if legacy_txt_proj and not isinstance(found, Released):
        raise ValueError(
            f"{path} is not one of the authors' width-pruned folders, so --legacy-txt-proj has no effect; leave it out"
        )
    if isinstance(found, Bundle):
        model = _variant_model(found, variant, base, dtype, device, streamed)
    else:
        _check_whole(found, variant, base, streamed)
        model = _whole_model(found, base, dtype, device, streamed)
    if streamed or not _is_stock(model):
        model.save_pretrained = partial(_refuse_to_save, path, streamed)
    return model


def _variant_model(
    bundle: Bundle,
    name: str | None,
    base: Path | None,
    dtype: torch.dtype,
    device: str,
    streamed: bool,
) -> AnyModule:
    if base is None:
        raise ValueError(
            f"{bundle.path} is a bundle: students only; give the base model it was made from as well"
        )
    weights = Weights(base)
    _check_folded_alike(bundle, weights)
    bundle.check_base(weights, base)
    check_bundle(bundle.tensors, bundle.plan)
    variant = bundle.plan.variant(name)
    if streamed and variant.tuned:
        raise ValueError(
            f"variant {variant.name!r} was fine-tuned as a whole, so no block of {base} could be streamed; leave streamed out"
        )
    load = block_loader(weights, dtype, device, streamed)
    return open_variant(weights, bundle, bundle.plan, variant, dtype, device, load)


def _check_whole(
    found: Standalone | Released | Weights, variant: str | None, base: Path | None, streamed: bool
) -> None:
    """Raises ValueError for what only a bundle has, or a full model."""
    if variant is not None:
        raise ValueError(
            f"{found.path} is not a bundle, so it has no variant {variant!r}; leave the variant out"
        )
    if streamed and (not isinstance(found, Weights) or base is not None):
        raise ValueError(
            f"{found.path} has no streamed form, which full models and bundles have; leave streamed out"
        )


def _whole_model(
    found: Standalone | Released | Weights,
    base: Path | None,
    dtype: torch.dtype,
    device: str,
    streamed: bool,
) -> AnyModule:
    if isinstance(found, Released):
        if warning := repeated_steps_warning(found):
            warnings.warn(f"{found.path}: {warning}", stacklevel=3)
        return found.model(dtype, device)
    if isinstance(found, Standalone):
        model = found.model(dtype, device)
    else:
        load = block_loader(found, dtype, device, streamed)
        model = assemble(found, None, found.layout, dtype, device, load)
    if base is not None:
        give_base(model, base, found.path)
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
