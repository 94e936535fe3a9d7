"""The models that LoRAs can be merged into: a full model, a renumbered file of a pruned one, a
standalone, a variant of a bundle. Tensors by the teacher's numbers, each read when it is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..architectures import Architecture
from ..architectures.folded import FOLDING
from ..plan import PruningPlan, Variant
from ..system.gguf_files import is_gguf
from .assembly import empty_model
from .bundle import Bundle
from .kinds import open_file
from .layout import Layout, Place, full_layout, layout_of
from .released import Released
from .standalone import Standalone
from .stock_files import SOURCE_PLAN_KEY, renumbered
from .stored_layout import StoredTensors, hints_in, open_layout
from .tensor_sources import Source
from .variant_sources import unrounded, variant_sources
from .weights import Weights


@dataclass(frozen=True, eq=False)
class MergeSource:
    """A model that LoRAs are merged into."""

    path: Path
    architecture: Architecture
    config: dict
    """the full model's"""
    layout: Layout
    sources: dict[str, Source]
    """by diffusers' names with the teacher's numbers"""
    kept_layout: str
    """the `--layout` that it has"""
    plan: PruningPlan | None = None
    """None for a full model, and for a renumbered file"""
    variant: Variant | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    """what its file says of itself and the new one has to say too"""
    stored: StoredTensors | None = None
    """its file's tensors by ComfyUI's names, where it is one that has such"""

    @property
    def indices(self) -> list[int] | None:
        """The teacher's numbers of its blocks; None for a full model that is not of a plan."""
        if self.plan is None and len(self.layout.places) == self.layout.num_blocks:
            return None
        return [place.index for place in self.layout.places]


def open_merge_source(path: Path, base: Path | None, variant: str | None) -> MergeSource:
    """Raises ValueError for a folded model, for one of the authors' folders, and for a base or
    variant that is missing or not wanted."""
    model = open_file(path)
    if isinstance(model, Released):
        raise ValueError(f"{path} is one of the authors' folders; make a file of it: ppcl import")
    if FOLDING in model.config:
        raise ValueError(
            f"{path} is folded; unfold it first (ppcl fold --form off), and fold what merge makes"
        )
    if isinstance(model, Bundle):
        return _of_bundle(model, base, variant)
    for name, value in (("variant", variant), ("base", base)):
        if value is not None:
            raise ValueError(f"{path} is not a bundle, so it has no {name}; leave --{name} out")
    return _of_standalone(model) if isinstance(model, Standalone) else _of_weights(model)


def _of_bundle(bundle: Bundle, base: Path | None, name: str | None) -> MergeSource:
    if base is None:
        raise ValueError(
            f"{bundle.path} is a bundle: students only; give the base model it was made from as --base"
        )
    weights, plan = Weights(base), bundle.plan
    bundle.check_base(weights, base)
    variant = plan.variant(name)
    return MergeSource(
        bundle.path,
        bundle.architecture,
        plan.config,
        layout_of(plan, variant),
        variant_sources(bundle, weights, plan, variant),
        "ppcl",
        plan,
        variant,
        {SOURCE_PLAN_KEY: plan.to_json()},
    )


def _of_standalone(model: Standalone) -> MergeSource:
    with torch.device("meta"):
        state = empty_model(model.architecture, model.config, model.layout).state_dict()
    sources = {
        key: Source(tuple(tensor.shape), partial(model.read, key)) for key, tensor in state.items()
    }
    return MergeSource(
        model.path,
        model.architecture,
        model.config,
        model.layout,
        sources,
        "ppcl",
        model.plan,
        model.plan.everything(),
        {SOURCE_PLAN_KEY: model.plan.to_json()},
        open_layout(model.path)[0],
    )


def _of_weights(weights: Weights) -> MergeSource:
    path, architecture = weights.path, weights.architecture
    sources = {
        key: Source(weights.shape(key), partial(unrounded, weights, key)) for key in weights.keys()
    }
    kept = "diffusers" if path.is_dir() else "gguf" if is_gguf(path) else "comfyui"
    stored, _ = open_layout(path)
    hints, kept_as = hints_in(stored), stored if kept == "comfyui" else None
    if not hints.get("indices"):
        layout = full_layout(weights.num_blocks)
        return MergeSource(
            path, architecture, weights.config, layout, sources, kept, stored=kept_as
        )
    indices, blocks = _checked_hints(hints, weights)
    config = _teacher_config(weights.config, indices, blocks)
    places = tuple(Place(index=index) for index in indices)
    return MergeSource(
        path,
        architecture,
        config,
        Layout(num_blocks=blocks, places=places),
        renumbered(sources, architecture, weights.config, range(len(indices)), config, indices),
        kept,
        metadata=_source_plan(stored),
        stored=kept_as,
    )


def _source_plan(stored: StoredTensors) -> dict[str, str]:
    """The plan that a renumbered file says it comes from, where hosts have not dropped it."""
    metadata = getattr(next(iter(stored.values()))[0], "metadata", {})
    return {key: text for key, text in metadata.items() if key == SOURCE_PLAN_KEY}


def _checked_hints(hints: dict, weights: Weights) -> tuple[list[int], int]:
    """(the teacher's numbers of the file's blocks, how many the teacher has)."""
    indices, blocks = hints["indices"], hints.get("blocks", 0)
    numbers = isinstance(indices, list) and all(type(n) is int for n in [*indices, blocks])
    if (
        not numbers
        or len(indices) != weights.num_blocks
        or sorted(set(indices)) != indices
        or not 0 <= indices[0] <= indices[-1] < blocks
    ):
        raise ValueError(
            f"{weights.path}: what it says of its blocks does not fit its tensors; export it again"
        )
    return indices, blocks


def _teacher_config(config: dict, indices: list[int], blocks: int) -> dict:
    """The configuration of a full model with `blocks` blocks, of which a file has these. Pruning
    never drops the first block of a list, so a list begins where its first block is."""
    whole = {**config, "num_layers": blocks}
    if "num_single_layers" in config:
        doubles = config["num_layers"]
        first = indices[doubles] if doubles < len(indices) else blocks
        whole |= {"num_layers": first, "num_single_layers": blocks - first}
    if "dual_attention_layers" in config:
        whole["dual_attention_layers"] = [indices[n] for n in config["dual_attention_layers"]]
    return whole
