"""The models that can be pruned: a full model, a standalone, a variant of a bundle; read one block
at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...architectures import Architecture, SharedText
from ...architectures.folded import FOLDING
from ...models.assembly import placed_block
from ...models.bundle import Bundle
from ...models.kinds import open_convertible
from ...models.layout import Layout, Place, layout_of
from ...models.surgery import empty_block
from ...models.weights import Weights
from ...plan import PruningPlan, Variant

PlacedBlock = Callable[[Place, torch.dtype, str, dict[int, SharedText]], nn.Module]


@dataclass(frozen=True, eq=False)
class SparsitySource:
    """A model to be made sparse."""

    path: Path
    """its file or folder"""
    architecture: Architecture
    config: dict
    layout: Layout
    fingerprint: str
    """the teacher's"""
    read: Callable[[str], torch.Tensor]
    """a tensor by diffusers' name with teacher indices; of an untuned variant only those outside
    its blocks"""
    plan: PruningPlan | None = None
    """None for a full model"""
    variant: Variant | None = None
    """None for a full model"""
    placed: PlacedBlock | None = None
    """makes the blocks of an untuned variant"""

    def block(
        self, place: Place, dtype: torch.dtype, device: str, shared: dict[int, SharedText]
    ) -> nn.Module:
        if self.placed is not None:
            return self.placed(place, dtype, device, shared)
        return self._filled(self.empty_block(place, shared), self.prefix(place), dtype, device)

    def empty_block(self, place: Place, shared: dict[int, SharedText] | None = None) -> nn.Module:
        """A block on the meta device."""
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
    """Raises ValueError for a folded model, and for a base or variant that is missing or not
    wanted."""
    model = open_convertible(path)
    if isinstance(model, Bundle):
        source = _of_bundle(model, base, variant)
    elif variant is not None:
        raise ValueError(
            f"{path} is not a bundle, so it has no variant {variant!r}; leave the variant out"
        )
    else:
        source = SparsitySource(
            path,
            model.architecture,
            model.config,
            model.layout,
            model.fingerprint,
            model.read,
            model.plan,
            model.plan.everything() if model.plan else None,
        )
    if FOLDING in source.config:
        raise ValueError(
            f"{path} is folded; make it sparse first and fold the result (ppcl fold --form off unfolds it)"
        )
    return source


def _of_bundle(bundle: Bundle, base: Path | None, name: str | None) -> SparsitySource:
    if base is None:
        raise ValueError(
            f"{bundle.path} is a bundle: students only; give the base model it was made from as --base"
        )
    weights, plan = Weights(base), bundle.plan
    bundle.check_base(weights, base)
    variant = plan.variant(name)
    read, placed = weights.read, lambda place, *where: placed_block(weights, bundle, place, *where)
    if variant.tuned:
        read, placed = partial(bundle.tuned, variant.name), None
    layout = layout_of(plan, variant)
    return SparsitySource(
        bundle.path,
        bundle.architecture,
        plan.config,
        layout,
        plan.fingerprint,
        read,
        plan,
        variant,
        placed,
    )
