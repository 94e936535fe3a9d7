"""Pruned blocks on ComfyUI's own modules, and the registry: one object for each architecture."""

from __future__ import annotations

from collections.abc import Iterable

import comfy.supported_models
import torch

from ...ppcl_engine.architectures import ARCHITECTURES
from . import checks, flux1, qwen_image, sd35, z_image
from .base import Host
from .entries import PrunedConfig, config_classes

HOSTS: tuple[Host, ...] = (
    qwen_image.HOST,
    flux1.HOST,
    sd35.HOST,
    z_image.HOST,
)
NEWER = {"krea2": "Krea2"}
"""architecture -> its class in comfy.supported_models, which older versions do not have"""
if hasattr(comfy.supported_models, NEWER["krea2"]):
    from . import krea2

    HOSTS += (krea2.HOST,)

_KNOWN = ", ".join(host.engine.name for host in HOSTS)


def host_named(name: str) -> Host:
    """The host of an architecture, by the engine's name for it."""
    for host in HOSTS:
        if host.engine.name == name:
            return host
    raise ValueError(f"{name} {_why_not_here(name)}")


def host_of(names: Iterable[str], where: str) -> Host:
    """The host of the architecture whose tensors have these names. Raises ValueError where no
    registered architecture does; `where` names the file or model in that message."""
    names = list(names)
    for host in HOSTS:
        if host.engine.detect(names):
            return host
    for architecture in ARCHITECTURES:
        if architecture.detect(names):
            why = _why_not_here(architecture.name)
            raise ValueError(f"{where} is {architecture.name}, which {why}")
    raise ValueError(
        f"{where} is not a model of a supported architecture ({_KNOWN}); choose another one"
    )


def _why_not_here(name: str) -> str:
    """Why the nodes do not know an architecture, and what to do."""
    if name in NEWER:
        return "needs a newer ComfyUI, since this one does not know it; update ComfyUI"
    return (
        f"has no nodes yet ({_KNOWN} have); export it with layout comfyui and choose it in a loader of "
        "ComfyUI's own, where that knows the model"
    )


def host_of_model(model) -> Host:
    """The host of a loaded MODEL, pruned or not."""
    transformer = model.model.diffusion_model
    pruned = getattr(transformer, "ppcl", None)
    return pruned.structure.host if pruned else host_of(transformer.state_dict(), "this MODEL")


def names_in_model(model, names: Iterable[str]) -> dict[str, str]:
    """Name of a tensor in a file of the full model -> its name in the loaded model, which differs
    in newer versions of ComfyUI."""
    config = model.model.model_config
    rename = (
        config.host_names if isinstance(config, PrunedConfig) else config.process_unet_state_dict
    )
    return {name: next(iter(rename({name: torch.empty(0)})), name) for name in names}


def register() -> str | None:
    """Puts our model classes first in ComfyUI's list. Returns None, or, where this ComfyUI differs
    from what the pack expects, the difference in words; then nothing is changed.

    Our classes already in the list are recognised by name, so that loading the pack again does not
    add them twice.
    """
    if difference := next(checks.differences(HOSTS), None):
        return difference
    ours = [config for host in HOSTS for config in config_classes(host)]
    models = comfy.supported_models.models
    models[:] = [
        *ours,
        *(m for m in models if m.__name__ not in {config.__name__ for config in ours}),
    ]
    return None
