"""What can be pruned: a full model, a standalone, a variant of a bundle. Read a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...architectures import Architecture, SharedText, architecture_named
from ...architectures.folded import FOLDING
from ...models.assembly import empty_model, placed_block
from ...models.bundle import Bundle
from ...models.kinds import Kind, kind_of
from ...models.layout import Layout, Place, full_layout, layout_of
from ...models.standalone import standalone_reader, standalone_structure
from ...models.surgery import empty_block
from ...models.weights import Weights
from ...plan import PruningPlan, Variant, plan_from_value
from ...system.tensor_files import check_exists

PlacedBlock = Callable[[Place, torch.dtype, str, dict[int, SharedText]], nn.Module]


@dataclass(frozen=True, eq=False)
class SparsitySource:
    """A model whose weights can be set to zero, a block at a time."""

    path: Path
    architecture: Architecture
    config: dict
    layout: Layout
    fingerprint: str
    read: Callable[[str], torch.Tensor]
    plan: PruningPlan | None = None
    variant: Variant | None = None
    placed: PlacedBlock | None = None

    def block(
        self, place: Place, dtype: torch.dtype, device: str, shared: dict[int, SharedText]
    ) -> nn.Module:
        if self.placed is not None:
            return self.placed(place, dtype, device, shared)
        return self._filled(self.empty_block(place, shared), self.prefix(place), dtype, device)

    def empty_block(self, place: Place, shared: dict[int, SharedText] | None = None) -> nn.Module:
        """On the meta device."""
        with torch.device("meta"):
            return empty_block(
                self.architecture, self.config, place, {} if shared is None else shared
            )

    def outer(self, dtype: torch.dtype, device: str) -> nn.Module:
        return self._filled(self.architecture.build_outer(self.config), "", dtype, device)

    def prefix(self, place: Place) -> str:
        return self.architecture.block_prefix(self.config, place.index)

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            state = self.architecture.build_outer(self.config).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    def _filled(self, module: nn.Module, prefix: str, dtype: torch.dtype, device: str) -> nn.Module:
        state = {name: self.read(prefix + name).to(device, dtype) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)


def open_source(path: Path, base: Path | None, variant: str | None) -> SparsitySource:
    """Raises ValueError for a folded model, and for a base or variant where there is none or too
    few."""
    check_exists(path)
    if kind_of(path) is Kind.BUNDLE:
        source = _of_bundle(path, base, variant)
    elif variant is not None:
        raise ValueError(
            f"{path} is not a bundle, so it has no variant {variant!r}; leave the variant out"
        )
    elif structure := standalone_structure(path):
        source = _of_standalone(path, plan_from_value(structure, path))
    else:
        weights = Weights(path)
        layout = full_layout(weights.num_blocks)
        source = SparsitySource(
            path, weights.architecture, weights.config, layout, weights.fingerprint, weights.read
        )
    if FOLDING in source.config:
        raise ValueError(
            f"{path} is folded; make it sparse first and fold the result (ppcl fold --form off unfolds it)"
        )
    return source


def _of_standalone(path: Path, plan: PruningPlan) -> SparsitySource:
    everything, architecture = plan.everything(), architecture_named(plan.architecture)
    layout = layout_of(plan, everything)
    with torch.device("meta"):
        names = empty_model(architecture, plan.config, layout).state_dict()
    read = standalone_reader(path, plan, names)
    return SparsitySource(
        path, architecture, plan.config, layout, plan.fingerprint, read, plan, everything
    )


def _of_bundle(path: Path, base: Path | None, name: str | None) -> SparsitySource:
    if base is None:
        raise ValueError(
            f"{path} is a bundle: students only; give the base model it was made from as --base"
        )
    bundle, weights = Bundle(path), Weights(base)
    plan = bundle.plan
    bundle.check_base(weights, base)
    variant = plan.variant(name)
    read, placed = weights.read, lambda place, *where: placed_block(weights, bundle, place, *where)
    if variant.tuned:
        read, placed = partial(bundle.tuned, variant.name), None
    layout = layout_of(plan, variant)
    return SparsitySource(
        path,
        weights.architecture,
        plan.config,
        layout,
        plan.fingerprint,
        read,
        plan,
        variant,
        placed,
    )
