"""Inspect: what a file holds, and which architectures are known, counted on the meta device."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..architectures import ARCHITECTURES
from ..bundle import Bundle, is_bundle, standalone_structure
from ..checkpoint import Weights, expected_shapes
from ..config import InspectConfig


def inspect(config: InspectConfig) -> None:
    """Prints. Raises ValueError when neither a path nor --architectures is given."""
    if not config.architectures and config.path is None:
        raise ValueError("inspect needs --path FILE or --architectures")
    found = known_models() if config.architectures else describe(config.path)
    print(json.dumps(found, indent=1) if config.json else _as_text(found))


def known_models() -> dict[str, dict]:
    """Every full-size model: architecture, blocks, width, parameters."""
    models = {}
    for architecture in ARCHITECTURES:
        for name, model_config in architecture.model_configs.items():
            models[name] = {
                "architecture": architecture.name,
                "parameters": sum(math.prod(shape) for shape in expected_shapes(architecture, model_config).values()),
                "blocks": architecture.num_blocks(model_config),
                "width": architecture.width(model_config),
            }
    return models


def describe(path: Path) -> dict:
    if is_bundle(path):
        plan, kind = Bundle(path).plan, "bundle"
    elif structure := standalone_structure(path):
        return {
            "kind": "standalone with teacher indices",
            "architecture": structure["architecture"],
            "blocks": structure["num_blocks"],
            "intervals": [f"{i['first']}-{i['last']}" for i in structure["intervals"]],
        }
    else:
        weights = Weights(path)
        parameters = sum(math.prod(weights.shape(key)) for key in weights.keys())
        return {
            "kind": "full model",
            "architecture": weights.architecture.name,
            "blocks": weights.num_blocks,
            "parameters": parameters,
            "fingerprint": weights.fingerprint,
        }
    return {
        "kind": kind,
        "architecture": plan.architecture,
        "blocks": plan.num_blocks,
        "teacher": plan.fingerprint,
        "intervals": [i.name for i in plan.intervals],
        "variants": [{"name": v.name, "parameters": v.parameters, "damage": v.damage} for v in plan.variants],
    }


def _as_text(found: dict) -> str:
    return "\n".join(
        f"{name:14} {value if not isinstance(value, list) else ' '.join(map(str, value))}"
        for name, value in found.items()
    )
