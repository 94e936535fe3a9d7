"""The bytes of an exported file, and what it takes to choose its formats and to refit in them."""

from __future__ import annotations

from ..algorithms.few_bits.measuring import MEASURED
from ..models.layout import full_layout
from ..models.storing import CHOICES, MIXED, SHARED_SCALES
from ..settings.convert_settings import ExportConfig
from .counts import EXACT, Count

WATCHED = 2  # walks of a block: to watch what its maps read, and rounded
REFIT = 3  # products of a map with its Gram matrix: error feedback, and the error


def exported_bytes(count: Count, config: ExportConfig) -> float:
    if config.store == MIXED:
        return config.budget_gb * 1e9
    bundle = config.layout == "bundle"
    values = sum(count.students) if bundle else count.variant(config.variant)
    return values * count.store(config.store)


def bits_demand(count: Count, config: ExportConfig) -> tuple[float, float, float]:
    """(bytes of the device's memory, bytes of files, FLOPs), of the full model: a block with its Gram
    matrices; the states of the whole calibration set at two boundaries; those of one batch for every
    block, with formats to choose. Nothing where neither is asked for."""
    if config.store != MIXED and not config.refit:
        return 0, 0, 0
    cost, size = count.sizes.cost, count.size
    places = full_layout(count.blocks).places
    costs = {place: cost.place(place) for place in places}
    largest = max(places, key=lambda place: costs[place].parameters)
    maps, read = cost.linear_maps(largest, [])
    grams = EXACT * (sum(width**2 for _, width in read) + sum(columns**2 for _, columns in maps))
    chosen = config.store == MIXED
    states = 3 * count.kept(count.samples.count)
    branches = chosen * count.blocks * count.kept(max(MEASURED, count.samples.batch))
    in_memory, on_disk = (states / 3, branches) if config.streamed else (states + branches, 0)
    weights = (cost.outer_parameters + costs[largest].parameters) * size
    stores = CHOICES.get(config.layout, ()) if chosen else (config.store,)
    fits = sum(REFIT if config.refit and store in SHARED_SCALES else 1 for store in stores)
    solved = len(places) * fits * sum(2 * rows * columns**2 for rows, columns in maps)
    watched = len(places) * sum(2 * rows * width**2 for rows, width in read)
    passes = WATCHED * sum(c.flops for c in costs.values())
    measured = chosen * count.blocks / 2 * sum(c.flops for c in costs.values())
    flops = count.samples.count * (passes + watched) + min(MEASURED, count.samples.count) * measured
    return weights + grams + in_memory, on_disk, flops + solved
