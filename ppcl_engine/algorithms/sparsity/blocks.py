"""Prunes a block's linear maps one after the other, by what they read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from ...architectures.linear_maps import (
    LINEAR_MAPS,
    Passed,
    first_column,
    known_columns,
    known_rows,
    linear_maps,
    masked_stream,
    present,
    sections,
)
from ...architectures.modules import AnyModule
from .clusters import KnownGroups
from .grams import Grams
from .permutation import column_order
from .pruning import Method, plain_score, prune_layer


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """How one linear map was pruned."""

    layer: str
    """its name"""
    rows: int
    """outputs"""
    columns: int
    """inputs"""
    dropped: int
    """weights set to zero"""
    error: float
    """of the layer's output, relative and squared"""
    share: float | None
    """g of the energy score"""
    permuted: bool
    """whether its columns are in another order than the teacher's"""

    def to_json(self) -> dict:
        return asdict(self)


def pruned_maps(block: nn.Module, skip: Iterable[str]) -> dict[str, nn.Linear]:
    """The maps to prune: all but those with one of `skip` in their names."""
    return {
        name: m for name, m in linear_maps(block).items() if not any(part in name for part in skip)
    }


def check_maps(block: nn.Module, method: Method, skip: Iterable[str], where: str) -> int:
    """How many maps are to be pruned. Raises ValueError for one that the pattern does not fit. The
    block may be on the meta device."""
    maps = pruned_maps(block, skip)
    for name, module in maps.items():
        method.pattern.check_columns(module.in_features, f"{where}, {name}")
    return len(maps)


def watch(architecture: str, block: nn.Module, skip: Iterable[str]) -> Grams:
    return Grams(pruned_maps(block, skip), partial(masked_stream, architecture))


def prune_block(
    architecture: str, block: nn.Module, grams: Grams, method: Method, permute: bool, where: str
) -> list[LayerReport]:
    """Changes the block's weights. permute: reorder columns for an N:M pattern where the maps
    before them can follow."""
    matrices = {name: grams.of(name, f"{where}, {name}") for name in grams.layers}
    permuted = (
        _permute(architecture, block, matrices, method)
        if permute and method.pattern.is_structured
        else set()
    )
    reports = []
    for name, module in grams.layers.items():
        groups = KnownGroups(
            known_rows(architecture, block, name), known_columns(architecture, block, name)
        )
        pruned = prune_layer(module.weight.double(), matrices.pop(name), method, groups)
        module.weight.data.copy_(pruned.weight)
        dropped = int((~pruned.stays).sum())
        rows, columns = module.weight.shape
        reports.append(
            LayerReport(
                layer=name,
                rows=rows,
                columns=columns,
                dropped=dropped,
                error=pruned.error,
                share=pruned.share,
                permuted=name in permuted,
            )
        )
    return reports


def _permute(
    architecture: str, block: nn.Module, matrices: dict[str, torch.Tensor], method: Method
) -> set[str]:
    """Orders channels that are passed from map to map; returns the names of the maps that read
    them. Their Gram matrices are reordered too."""
    changed = set()
    for passed in LINEAR_MAPS[architecture].passed:
        takers = [name for name in passed.takers if name in matrices]
        if takers and present(passed, block):
            order = _common_order(block, passed, takers, matrices, method)
            _reorder(block, passed, order, matrices)
            changed |= set(takers)
    return changed


def _common_order(
    block: nn.Module, passed: Passed, takers: list[str], matrices, method: Method
) -> torch.Tensor:
    """One order for all maps that read the channels: their scores, each divided by its own sum, are
    stacked."""
    giver: AnyModule = block.get_submodule(passed.givers[0])
    size, scores = giver.out_features, []
    for name in takers:
        module: AnyModule = block.get_submodule(name)
        score = plain_score(module.weight.double(), matrices[name], method.score)
        first = first_column(passed, module)
        scores.append(score[:, first : first + size] / score.sum())
    return column_order(torch.cat(scores), method.pattern, sections(passed, block))


def _reorder(
    block: nn.Module, passed: Passed, order: torch.Tensor, matrices: dict[str, torch.Tensor]
) -> None:
    """Reorders the givers' rows and the takers' columns (of all takers in the block, including
    those that stay dense)."""
    for name in passed.givers:
        module: AnyModule = block.get_submodule(name)
        module.weight.data = module.weight[order]
        if module.bias is not None:
            module.bias.data = module.bias[order]
    for name, module in linear_maps(block).items():
        if name in passed.takers:
            first = first_column(passed, module)
            columns = torch.arange(module.in_features, device=order.device)
            columns[first : first + len(order)] = first + order
            module.weight.data = module.weight[:, columns]
            if name in matrices:
                matrices[name] = matrices[name][columns][:, columns]
