"""Pruned blocks on ComfyUI's own modules. The registry: an explicit tuple, one object a file."""

from __future__ import annotations

from collections.abc import Iterable

import comfy.supported_models
import torch

from . import checks, flux1, qwen_image, sd35
from .base import Host
from .building import PrunedConfig, config_classes

HOSTS: tuple[Host, ...] = (qwen_image.HOST, flux1.HOST, sd35.HOST)


def host_named(name: str) -> Host:
    """Of an architecture, by the engine's name."""
    for host in HOSTS:
        if host.engine.name == name:
            return host
    raise ValueError(
        f"{name} has no nodes yet; known: {', '.join(host.engine.name for host in HOSTS)}"
    )


def host_of(names: Iterable[str], where: str) -> Host:
    """By the names of a file's or a model's tensors. Raises ValueError for those of no architecture
    that is known here."""
    names = list(names)
    for host in HOSTS:
        if host.engine.detect(names):
            return host
    known = ", ".join(host.engine.name for host in HOSTS)
    raise ValueError(
        f"{where} is no model of an architecture that is known here ({known}); choose another one"
    )


def host_of_model(model) -> Host:
    """Of one that the host loaded, pruned or not."""
    transformer = model.model.diffusion_model
    parts = getattr(transformer, "ppcl", None)
    return parts.structure.host if parts else host_of(transformer.state_dict(), "this MODEL")


def names_in_model(model, names: Iterable[str]) -> dict[str, str]:
    """A tensor's name in a file of the full model -> in a model that the host loaded: newer hosts
    rename some."""
    config = model.model.model_config
    rename = (
        config.host_names if isinstance(config, PrunedConfig) else config.process_unet_state_dict
    )
    return {name: next(iter(rename({name: torch.empty(0)})), name) for name in names}


def register() -> str | None:
    """First in the host's list of models; by name, so that loading this pack again does not double
    them. Where this host is not as known nothing of it is touched, and the answer is what is
    different."""
    if difference := next(checks.differences(HOSTS), None):
        return difference
    ours = [config for host in HOSTS for config in config_classes(host)]
    models = comfy.supported_models.models
    models[:] = [
        *ours,
        *(m for m in models if m.__name__ not in {config.__name__ for config in ours}),
    ]
    return None
