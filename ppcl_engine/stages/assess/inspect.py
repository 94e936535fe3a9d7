"""Inspect: print what a file holds, or which full-size models are known. Parameters are counted on the
meta device."""

from __future__ import annotations

from pathlib import Path

from ...algorithms.sparsity.files import sparsity_of
from ...algorithms.sparsity.patterns import UNSTRUCTURED
from ...architectures import ARCHITECTURES, Architecture
from ...architectures.folded import folding_of
from ...models.bundle import Bundle
from ...models.bundle_contents import check_bundle
from ...models.kinds import open_file
from ...models.released import (
    Released,
    published_intervals,
    repeated_steps_warning,
    teacher_indices,
)
from ...models.standalone import Standalone
from ...models.stored_layout import files_of
from ...models.teacher_hashes import check_all
from ...models.weights import Weights, full_parameters
from ...report.inspected import text_of_known, text_of_model
from ...settings.assess_settings import InspectConfig
from ...system.gguf_files import GGUF_SUFFIX, is_gguf
from ...system.json_text import json_text
from ...system.progress import Progress
from ...system.tensor_files import TensorFile

UNHASHED = (".bin", GGUF_SUFFIX)  # endings of files that carry no hashes


def inspect(config: InspectConfig) -> None:
    """Prints. Raises ValueError when neither a path nor --architectures is given."""
    if config.base is not None and not config.verify:
        raise ValueError(
            "inspect compares a --base only with --verify; add it, or leave --base out"
        )
    if config.architectures:
        found, text_of = known_models(), text_of_known
    elif config.path is None:
        raise ValueError("inspect needs --path FILE or --architectures")
    else:
        found, text_of = describe(config.path, config.legacy_txt_proj), text_of_model
        found["bytes"] = sum(file.stat().st_size for file in files_of(config.path))
        found |= verified(config.path, config.base) if config.verify else {}
    print(json_text(found, indent=1) if config.json else text_of(found))


def known_models() -> dict[str, dict]:
    """Name -> architecture, blocks, width, parameters and what the modulations read, for every known
    full-size model. Modulations that read only the timestep can be folded."""
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
    """What the file or folder is, and which of its weights are zero if it was made sparse."""
    return {**_describe(path, legacy_txt_proj), **_sparsity(path)}


def verified(path: Path, base: Path | None) -> dict:
    """Reads every tensor of the file or folder and compares it with its hash. Raises ValueError naming
    the first that differs."""
    files = [TensorFile(file) for file in files_of(path) if file.suffix not in UNHASHED]
    count = 0
    for file in files:
        for name in Progress(file.keys(), desc=f"verify {file.path.name}", unit="tensor"):
            file.verify(name)
            count += file.has_hashes
    if count:
        result = f"{count:,} tensors are as they were written"
    else:
        result = "the file carries no hashes, so there is nothing to compare it with"
    return {"verified": result} | (_compared(path, base) if base is not None else {})


def _compared(path: Path, base: Path) -> dict:
    """The result of comparing the base with the hashes of its tensors that the bundle holds."""
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
    found = open_file(path, legacy_txt_proj)
    if legacy_txt_proj and not isinstance(found, Released):
        raise ValueError(
            f"{path} has no text projections of the authors', so --legacy-txt-proj does not apply; leave it out"
        )
    return {
        "kind": found.kind,
        "architecture": found.architecture.name,
        "blocks": found.num_blocks,
        **_facts(found),
        **_folding(found.config),
    }


def _facts(found: Bundle | Standalone | Released | Weights) -> dict:
    match found:
        case Bundle():
            return _of_bundle(found)
        case Standalone():
            return {"intervals": [i.name for i in found.plan.intervals]}
        case Released():
            return _of_released(found)
    return {
        "parameters": full_parameters(found.architecture, found.config),
        "fingerprint": found.fingerprint,
        **_teacher_blocks(found.architecture, found.config),
    }


def _of_bundle(bundle: Bundle) -> dict:
    plan = bundle.plan
    check_bundle(bundle.tensors, plan, whole=True)
    return {
        "teacher": plan.fingerprint,
        "intervals": [i.name for i in plan.intervals],
        "variants": [
            {"name": v.name, "parameters": v.parameters, "bytes": v.bytes, "damage": v.damage}
            for v in plan.variants
        ],
    }


def _of_released(released: Released) -> dict:
    """Blocks are counted as in the folder, from 0 without gaps; parameters as stored."""
    places, known = released.layout.places, _teacher_blocks(released.architecture, released.config)
    indices = known.get("teacher_blocks")
    warning = repeated_steps_warning(released, indices if isinstance(indices, list) else None)
    return {
        "parameters": released.parameters,
        "text_projections": [place.index for place in places if place.text_source is not None],
        "text_steps": [place.index for place in places if place.steps_text],
        "ffn_projections": [site.name for place in places for site in place.ffn],
        **known,
        **({"warning": warning} if warning else {}),
    }


def _teacher_blocks(architecture: Architecture, model_config: dict) -> dict[str, list[int] | str]:
    """The teacher's index of every block, for a model with fewer blocks than the full-size model of its
    width; empty for others."""
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
    """What replaces the modulations, if they are folded."""
    folding = folding_of(config)
    if folding is None:
        return {}
    what = "timesteps" if folding.form == "table" else "coefficients"
    return {"folded": f"{folding.form} of {folding.inputs} {what}"}


def _sparsity(path: Path) -> dict[str, str]:
    """Which weights are zero, if the file was made sparse."""
    has_metadata = path.is_file() and not is_gguf(path)
    sparsity = sparsity_of(TensorFile(path).metadata) if has_metadata else None
    if sparsity is None:
        return {}
    how = f"{sparsity.pattern} by {sparsity.score}"
    if sparsity.pattern == UNSTRUCTURED:
        how += f" in {sparsity.granularity}"
    share = 100 * sparsity.dropped / sparsity.weights
    facts = [f"{how}, {share:.1f} % of {sparsity.weights:,} weights are zero"]
    facts += ["compressed on disk"] if sparsity.pattern == "2:4" else []
    facts += ["weights changed places by the exact error"] if sparsity.exchange else []
    facts += ["the others make up for them"] if sparsity.compensate else []
    facts += ["channels in another order than the teacher's"] if sparsity.permuted else []
    facts += [sparsity.note] if sparsity.note else []
    return {"sparse": "; ".join(facts)}
