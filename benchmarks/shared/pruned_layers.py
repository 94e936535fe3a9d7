"""A whole model pruned from statistics that are collected once: every row of the benchmark has the
very same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ppcl_engine.algorithms.sparsity.blocks import LayerReport, prune_block, pruned_maps, watch
from ppcl_engine.algorithms.sparsity.grams import Grams, timestep_weights
from ppcl_engine.algorithms.sparsity.layer import relative_error
from ppcl_engine.algorithms.sparsity.pruning import Method
from ppcl_engine.data.calibration import CalibrationSet
from ppcl_engine.models.streaming import Teacher


@torch.no_grad()
def collect(teacher: Teacher, calibration: CalibrationSet, scheme: str) -> list[Grams]:
    """The Grams of every block, measured on what the teacher's own blocks before it give."""
    rows, found = calibration.all_inputs(), []
    states = [teacher.embed(inputs) for inputs in rows]
    weights = [timestep_weights(inputs["timestep"], scheme) for inputs in rows]
    for _, block in teacher.walk(0, teacher.num_blocks - 1):
        grams = watch(teacher.architecture.name, block, ())
        for batch, state in enumerate(states):
            with grams.watching(state, weights[batch]):
                states[batch] = teacher.architecture.run_block(block, state)
        found.append(grams)
    return found


@dataclass(frozen=True)
class PrunedModel:
    """errors: by block and layer, relative and squared, on the calibration inputs and on unseen
    ones; None where channels stand in another order. bytes: in 16 bits, zeros as the pattern stores
    them."""

    model: nn.Module
    errors: list[float]
    unseen_errors: list[float] | None
    bytes: int


@torch.no_grad()
def prune_model(
    teacher: Teacher,
    grams: Sequence[Grams],
    unseen: Sequence[Grams],
    method: Method,
    permute: bool = False,
) -> PrunedModel:
    blocks, reports, unseen_errors = [], [], []
    for index in range(teacher.num_blocks):
        dense, block = teacher.block(index), copy.deepcopy(teacher.block(index))
        own = replace(grams[index], layers=pruned_maps(block, ()))
        reports += prune_block(
            teacher.architecture.name, block, own, method, permute, f"block {index}"
        )
        unseen_errors += _errors(dense, block, unseen[index])
        blocks.append(block)
    outer = teacher.weights.outer(teacher.dtype, teacher.device)
    model = teacher.architecture.assemble(outer, teacher.config, blocks)
    moved = any(report.permuted for report in reports)
    size = bytes_of(model, reports, method.pattern.name)
    return PrunedModel(
        model, [report.error for report in reports], None if moved else unseen_errors, size
    )


def _errors(dense: nn.Module, block: nn.Module, grams: Grams) -> list[float]:
    found = []
    for name, module in pruned_maps(dense, ()).items():
        weight, new = (m.weight.double() for m in (module, block.get_submodule(name)))
        found.append(relative_error(weight - new, weight, grams.of(name, name)))
    return found


def bytes_of(model: nn.Module, reports: Sequence[LayerReport | dict], pattern: str) -> int:
    """16 bits a number; of a pruned layer those that stay, and two bits for each of them (2:4), or
    one for every place."""
    rows = [report if isinstance(report, dict) else report.to_json() for report in reports]
    weights, dropped = (
        sum(f(row) for row in rows)
        for f in (lambda r: r["rows"] * r["columns"], lambda r: r["dropped"])
    )
    places = (weights - dropped) * 2 if pattern == "2:4" else weights
    return 2 * (sum(p.numel() for p in model.parameters()) - dropped) + places // 8
