"""What making a model sparse takes, from sizes alone: no weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..config_files import SparsifyConfig
from ..layout import Place, full_layout
from ..machine import flops_a_second
from ..run import DTYPES, resolve_device
from .patterns import UNSTRUCTURED
from .source import open_source

if TYPE_CHECKING:
    from ..needs import _Count

EXACT = torch.float64.itemsize
WORKING_COPIES = 8  # of a map in float64: masks' prices, what went, the refit's directions
COMPRESSED = {"2:4": 9 / 16}
SCORING, MOVING, EXCHANGING, REFITTING = 5, 32, 8, 33
"""Products of a map with its Gram matrix that shares, budgets of clusters, exchanges and refit take, at most or about."""


def sparsify(count: _Count, config: SparsifyConfig) -> tuple[str, float, float, float, float]:
    """As `needs` counts every stage: (name, bytes that are certain, bytes more, bytes on disk, FLOPs); those in float64 count
    as many as would take the same time."""
    places, cost = _places(count, config), count.sizes.cost
    costs = {place: cost.place(place) for place in places}
    largest = max(places, key=lambda place: costs[place].parameters)
    maps, read = cost.linear_maps(largest, config.skip.replace(",", " ").split())
    states, outer = count.kept(count.samples.count), count.sizes.cost.outer_parameters
    here, disk = (0, 2 * states) if config.streamed else (states, 0)
    grams = EXACT * (sum(width**2 for _, width in read) + sum(columns**2 for _, columns in maps))
    sure = (outer + costs[largest].parameters) * count.size + grams + states + here
    parameters = sum(c.parameters for c in costs.values())
    itemsize = DTYPES[config.store].itemsize
    disk += itemsize * (outer + parameters * (1 + COMPRESSED.get(config.pattern, 1)))
    passes = (2 if config.feed == "pruned" else 1) * sum(c.flops for c in costs.values())
    watched = len(places) * sum(2 * rows * width**2 for rows, width in read)
    pruned = len(places) * sum(2 * rows * columns**2 for rows, columns in maps) * _products(config)
    flops = count.samples.count * (passes + watched) + pruned * _slower(config)
    return "sparsify", sure, WORKING_COPIES * EXACT * max((r * c for r, c in maps), default=0), disk, flops


def _places(count: _Count, config: SparsifyConfig) -> tuple[Place, ...]:
    """Of the variant; a model that is known by its name alone is whole."""
    if config.path.is_file():
        return open_source(config.path, config.base, config.variant).layout.places
    return full_layout(count.blocks).places


def _products(config: SparsifyConfig) -> int:
    moving = config.pattern == UNSTRUCTURED and config.granularity == "cluster"
    refitting = config.compensate or config.score == "obs"
    return SCORING + MOVING * moving + EXCHANGING * config.exchange + REFITTING * refitting


def _slower(config: SparsifyConfig) -> float:
    """float64 against the precision in which blocks run."""
    device = resolve_device(config.device)
    return flops_a_second(device, DTYPES[config.dtype]) / flops_a_second(device, torch.float64)
