"""Inspect: what a file holds, and which architectures are known, counted on the meta device."""

from __future__ import annotations

from pathlib import Path

from ...algorithms.sparsity.files import sparsity_of
from ...algorithms.sparsity.patterns import UNSTRUCTURED
from ...architectures import ARCHITECTURES, Architecture
from ...architectures.folded import folding_of
from ...models.bundle import Bundle
from ...models.bundle_contents import check_bundle
from ...models.kinds import Kind, kind_of
from ...models.released import (
    Released,
    published_intervals,
    repeated_steps_warning,
    teacher_indices,
)
from ...models.standalone import check_standalone, standalone_structure
from ...models.stored_layout import files_of
from ...models.teacher_hashes import check_all
from ...models.weights import Weights, full_parameters
from ...plan import PruningPlan
from ...settings.assess_settings import InspectConfig
from ...system.json_text import json_text
from ...system.progress import Progress
from ...system.tensor_files import TensorFile


def inspect(config: InspectConfig) -> None:
    """Prints. Raises ValueError when neither a path nor --architectures is given."""
    if config.base is not None and not config.verify:
        raise ValueError(
            "inspect compares a --base only with --verify; add it, or leave --base out"
        )
    if config.architectures:
        found = known_models()
    elif config.path is None:
        raise ValueError("inspect needs --path FILE or --architectures")
    else:
        found = describe(config.path, config.legacy_txt_proj)
        found |= verified(config.path, config.base) if config.verify else {}
    print(json_text(found, indent=1) if config.json else _as_text(found))


def known_models() -> dict[str, dict]:
    """Every full-size model: architecture, blocks, width, parameters, what its modulations read
    (the timestep alone: they can be folded)."""
    models = {}
    for architecture in ARCHITECTURES:
        for name, model_config in architecture.model_configs.items():
            models[name] = {
                "architecture": architecture.name,
                "parameters": full_parameters(architecture, model_config),
                "blocks": architecture.num_blocks(model_config),
                "width": architecture.width(model_config),
                "modulations_read": list(architecture.modulation_reads(model_config)),
            }
    return models


def describe(path: Path, legacy_txt_proj: bool = False) -> dict:
    return {**_describe(path, legacy_txt_proj), **_sparsity(path)}


def verified(path: Path, base: Path | None) -> dict:
    """Every tensor of the file, or of a folder's, is read and compared. Raises ValueError naming
    the first that differs."""
    files = [TensorFile(file) for file in files_of(path) if file.suffix != ".bin"]
    count = 0
    for file in files:
        for name in Progress(file.keys(), desc=f"verify {file.path.name}", unit="tensor"):
            file.verify(name)
            count += file.has_hashes
    said = f"{count:,} tensors are as they were written"
    found = {
        "verified": said
        if count
        else "the file carries no hashes, so there is nothing to compare it with"
    }
    return found | (_compared(path, base) if base is not None else {})


def _compared(path: Path, base: Path) -> dict:
    bundle, weights = Bundle(path), Weights(base)
    bundle.plan.check_teacher(weights.architecture.name, weights.fingerprint, base)
    if bundle.expected_base is None:
        return {
            "base": "the bundle was made before hashes of its teacher were kept; names, shapes and vectors fit"
        }
    check_all(bundle.expected_base, weights)
    return {
        "base": "; ".join(
            [
                f"{len(bundle.expected_base.recorded):,} tensors compared",
                *bundle.expected_base.notes(weights),
            ]
        )
    }


def _describe(path: Path, legacy_txt_proj: bool) -> dict:
    kind = kind_of(path)
    if kind is Kind.RELEASED:
        return _describe_released(Released(path, legacy_txt_proj))
    if legacy_txt_proj:
        raise ValueError(
            f"{path} has no text projections of the authors', so --legacy-txt-proj says nothing"
        )
    if kind is Kind.BUNDLE:
        bundle = Bundle(path)
        check_bundle(bundle.file, bundle.plan, whole=True)
        return _describe_plan(bundle.plan)
    if structure := standalone_structure(path):
        check_standalone(path, structure)
        return {
            "kind": kind.value,
            "architecture": structure["architecture"],
            "blocks": structure["num_blocks"],
            "intervals": [f"{i['first']}-{i['last']}" for i in structure["intervals"]],
            **_folding(structure["config"]),
        }
    weights = Weights(path)
    return {
        "kind": kind.value,
        "architecture": weights.architecture.name,
        "blocks": weights.num_blocks,
        "parameters": full_parameters(weights.architecture, weights.config),
        "fingerprint": weights.fingerprint,
        **_teacher_blocks(weights.architecture, weights.config),
        **_folding(weights.config),
    }


def _describe_plan(plan: PruningPlan) -> dict:
    return {
        "kind": Kind.BUNDLE.value,
        "architecture": plan.architecture,
        "blocks": plan.num_blocks,
        "teacher": plan.fingerprint,
        "intervals": [i.name for i in plan.intervals],
        "variants": [
            {"name": v.name, "parameters": v.parameters, "damage": v.damage} for v in plan.variants
        ],
        **_folding(plan.config),
    }


def _describe_released(released: Released) -> dict:
    """Blocks are counted as in the folder, from 0 without gaps; parameters as stored."""
    places, known = released.layout.places, _teacher_blocks(released.architecture, released.config)
    indices = known.get("teacher_blocks")
    warning = repeated_steps_warning(released, indices if isinstance(indices, list) else None)
    return {
        "kind": Kind.RELEASED.value,
        "architecture": released.architecture.name,
        "blocks": released.num_blocks,
        "parameters": released.parameters,
        "text_projections": [place.index for place in places if place.text_source is not None],
        "text_steps": [place.index for place in places if place.steps_text],
        "ffn_projections": [site.name for place in places for site in place.ffn],
        **known,
        **({"warning": warning} if warning else {}),
    }


def _teacher_blocks(architecture: Architecture, model_config: dict) -> dict[str, list[int] | str]:
    """The teacher's index of every block, where a full-size model is shorter than the one it came
    from."""
    full = {
        architecture.width(c): architecture.num_blocks(c)
        for c in architecture.model_configs.values()
    }
    count = architecture.num_blocks(model_config)
    if count >= full.get(architecture.width(model_config), 0):
        return {}
    intervals = published_intervals(architecture, model_config)
    if intervals is None:
        return {"teacher_blocks": "not known; `ppcl import` takes them as --intervals"}
    return {"teacher_blocks": teacher_indices(count, intervals)}


def _folding(config: dict) -> dict[str, str]:
    """What stands for the modulations, where they are folded away."""
    folding = folding_of(config)
    if folding is None:
        return {}
    what = "timesteps" if folding.form == "table" else "coefficients"
    return {"folded": f"{folding.form} of {folding.inputs} {what}"}


def _sparsity(path: Path) -> dict[str, str]:
    """What weights are zero, where a file was made sparse."""
    found = sparsity_of(TensorFile(path).metadata) if path.is_file() else None
    if found is None:
        return {}
    how = f"{found.pattern} by {found.score}" + (
        f" in {found.granularity}" if found.pattern == UNSTRUCTURED else ""
    )
    said = [
        f"{how}, {100 * found.dropped / found.weights:.1f} % of {found.weights:,} weights are zero"
    ]
    said += ["compressed on disk"] if found.pattern == "2:4" else []
    said += ["weights changed places by the exact error"] if found.exchange else []
    said += ["the others make up for them"] if found.compensate else []
    said += ["channels in another order than the teacher's"] if found.permuted else []
    return {"sparse": "; ".join([*said, *filter(None, [found.note])])}


def _as_text(found: dict) -> str:
    return "\n".join(
        f"{name:14} {value if not isinstance(value, list) else ' '.join(map(str, value))}"
        for name, value in found.items()
    )
