"""Architecture and configuration of a model that is named, or lies in a folder or a file; no weights are read."""

from __future__ import annotations

from pathlib import Path

from .architectures import ARCHITECTURES, Architecture, architecture_named
from .bundle import is_bundle, standalone_structure
from .checkpoint import Weights
from .files import read_json


def model_config(model: Path) -> tuple[str, Architecture, dict]:
    """(name, architecture, configuration) of a known model's name, a folder with a config.json, or a model file."""
    for architecture in ARCHITECTURES:
        if str(model) in architecture.model_configs:
            return str(model), architecture, architecture.model_configs[str(model)]
    for folder in (model / "transformer", model):
        if (folder / "config.json").exists():
            return _from_config_file(model, read_json(folder / "config.json"))
    if structure := standalone_structure(model):
        return model.name, architecture_named(structure["architecture"]), structure["config"]
    if is_bundle(model):
        raise ValueError(f"{model} is a bundle: students only; give the base model it was made from as --base")
    if model.is_file():
        weights = Weights(model)
        return model.name, weights.architecture, weights.config
    known = ", ".join(name for a in ARCHITECTURES for name in a.model_configs)
    raise ValueError(f"--model {model}: no such file, no folder with a config.json, and not one of {known}")


def _from_config_file(model: Path, values: dict) -> tuple[str, Architecture, dict]:
    for architecture in ARCHITECTURES:
        if values.get("_class_name") == architecture.diffusers_class:
            return model.name, architecture, {k: v for k, v in values.items() if not k.startswith("_")}
    known = ", ".join(a.diffusers_class for a in ARCHITECTURES)
    raise ValueError(f"{model}: class {values.get('_class_name')!r} is unknown; known: {known}")
