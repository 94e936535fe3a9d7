"""What a stage will take: memory of its device, disk, time. From sizes alone; no weights are read.

`at_least` counts only what is certain (weights, optimiser, states that are kept), so that nothing
is refused that would have fitted; `memory` adds what a backward keeps and a cache of states in
memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..algorithms.sparsity.patterns import UNSTRUCTURED
from ..algorithms.sparsity.source import open_source
from ..models.layout import Place, full_layout
from ..settings.assess_settings import EvaluateConfig
from ..settings.base_settings import Common
from ..settings.convert_settings import ExportConfig, SparsifyConfig
from ..settings.prune_settings import (
    CalibrateConfig,
    DetectConfig,
    DetectWidthConfig,
    DistillDepthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
    ProbeConfig,
    VariantsConfig,
)
from ..system.machine import DTYPES, flops_a_second, resolve_device
from .counts import FP32, OPTIMISER_COPIES, SAVED_COPIES, TUNING_COPIES, Count

BYTES_A_SECOND = 5e8  # of a disk
NAMED_VARIANTS = 5
EXACT = torch.float64.itemsize
WORKING_COPIES = 8  # of a map in float64: masks' prices, what went, the refit's directions
COMPRESSED = {"2:4": 9 / 16}
SCORING, MOVING, EXCHANGING, REFITTING = 5, 32, 8, 33
"""Products of a map with its Gram matrix that shares, budgets of clusters, exchanges and refit
take, at most or about."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes on the device, bytes of new files that are certain, seconds of an idle machine (more
    where blocks are small)."""

    stage: str
    memory: int
    at_least: int
    disk: int
    seconds: float


def needs(config: Common | SparsifyConfig, calibrate: CalibrateConfig | None = None) -> Needs:
    """`calibrate`: of the same job, where its calibration is not there yet; with neither, the
    smallest one counts."""
    count = Count(config, calibrate)
    stage, sure, more, disk, flops = _OF[type(config)](count, config)
    speed = flops_a_second(resolve_device(config.device), DTYPES[config.dtype])
    seconds = flops / speed + disk / BYTES_A_SECOND
    return Needs(
        stage=stage, memory=int(sure + more), at_least=int(sure), disk=int(disk), seconds=seconds
    )


def _calibrate(count: Count, config: CalibrateConfig):
    samples = count.samples
    # more than parts and then one file of latents and embeddings take
    disk = 2 * samples.count * count.state
    if config.images:  # one sample goes through the model, a block at a time
        return (
            "calibrate",
            count.sizes.streamed * count.size,
            samples.batch * count.state,
            disk,
            count.forward,
        )
    drawn = 2 * config.steps * samples.count * count.forward
    # with a caption and without
    states = 2 * count.state * (samples.count if config.streamed else samples.batch)
    return "calibrate", count.teacher, count.together(config, states), disk, drawn


def _probe(count: Count, config: ProbeConfig):
    states = count.kept(count.samples.count)
    here, disk = (0, 2 * states) if config.streamed else (2 * states, 0)
    disk += 2 * FP32 * count.blocks * count.width**2
    tokens = states / count.size / count.width
    fits = count.blocks * tokens * 4 * count.width**2
    return "probe", count.teacher + here, states, disk, count.samples.count * count.forward + fits


def _detect(count: Count, config: DetectConfig):
    states = count.kept(config.samples)
    here, disk = (0, count.blocks * states) if config.streamed else (count.blocks * states, 0)
    sections = count.sizes.architecture.sections(count.sizes.config)
    pairs = [
        count.blocks - 1 - k for s in sections for u in s for k in s if u < k < u + config.longest
    ]
    passes = count.blocks + (1 if config.local else 2) * sum(pairs)
    chains = len(pairs) * (states if config.local else 2 * states) if config.streamed else 0
    sums = 6 * 8 * count.width**2  # of both streams: X^T X, its factor and X^T Y
    fits = len(pairs) * states / count.size / count.width * 3 * count.width**2
    measured = passes * min(config.samples, count.samples.count) * count.forward / count.blocks
    more = 2 * states + count.together(config, chains) + sums
    return "detect", count.teacher + here, more, disk, measured + fits


def _distill_depth(count: Count, config: DistillDepthConfig):
    boundaries = 2 * len(count.intervals) + 2
    cache = 0 if config.streamed else count.cache(config.updates, config.cache_gb, boundaries)
    disk = SAVED_COPIES * sum(count.students) * FP32
    sure = count.teacher + OPTIMISER_COPIES * max(count.students) * FP32
    more = cache + count.backward + count.read_in_training(max(count.students))
    more += count.waiting(SAVED_COPIES * FP32 * (sum(count.students) - max(count.students)))
    return "distill-depth", sure, more, disk, count.rounds(config, len(count.intervals))


def _detect_width(count: Count, config: DetectWidthConfig):
    states, equations = count.kept(count.samples.count), 4 * 8 * count.width**2
    fits = 2 * count.blocks
    here, disk = (0, 2 * states) if config.streamed else (2 * states, 0)
    solutions = fits * 2 * FP32 * count.width**2
    more = states + count.together(config, max(fits * equations, fits * states))
    more, disk = (more, disk + solutions) if config.streamed else (more + solutions, disk)
    flops = (fits * config.samples + 2 * count.samples.count) * count.forward
    return "detect-width", count.teacher + here + equations, more, disk, flops


def _distill_width(count: Count, config: DistillWidthConfig):
    sites = (
        len(count.plan.sites) if count.plan is not None and not config.sites else count.blocks // 4
    )
    cache = 0 if config.streamed else count.cache(config.updates, config.cache_gb, 4 * sites)
    certain = sites if count.plan is not None else 1
    sure = (
        count.teacher
        + OPTIMISER_COPIES * count.width**2 * FP32
        + 2 * min(count.students) * count.size
    )
    disk = certain * SAVED_COPIES * count.width**2 * FP32
    more = cache + count.backward + count.read_in_training(count.width**2)
    more += count.waiting(SAVED_COPIES * FP32 * count.width**2 * (certain - 1))
    return "distill-width", sure, more, disk, count.rounds(config, sites)


def _polish(count: Count, config: PolishConfig):
    return "polish", *_tuned(count, config, sum(count.students))


def _finetune(count: Count, config: FinetuneConfig):
    return "finetune", *_tuned(
        count, config, count.variant(config.variant) or count.parameters // 2
    )


def _tuned(count: Count, config: PolishConfig | FinetuneConfig, trained: int):
    """Master weights, gradients, moments and average are float32."""
    kept = (1 if config.checkpointing else count.blocks) * count.backward + count.read_in_training(
        trained
    )
    flops = 4 * config.steps * count.samples.batch * count.forward
    disk = 4 * FP32 * trained  # used and raw weights, two moments
    return count.teacher + TUNING_COPIES * FP32 * trained, kept, disk, flops


def _variants(count: Count, config: VariantsConfig):
    states = count.kept(config.samples)
    flops = (
        (len(count.intervals) + NAMED_VARIANTS)
        * min(config.samples, count.samples.count)
        * count.forward
    )
    models = len(count.intervals) + NAMED_VARIANTS
    return (
        "variants",
        count.teacher + states,
        states + count.together(config, models * states),
        0,
        flops,
    )


def _export(count: Count, config: ExportConfig):
    stored = sum(count.students) if config.layout == "bundle" else count.variant(config.variant)
    itemsize = 1 if config.store == "float8" else DTYPES[config.store].itemsize
    return "export", 0, max(count.sizes.blocks) * FP32, stored * itemsize, 0


def _evaluate(count: Count, config: EvaluateConfig):
    drawn = NAMED_VARIANTS * config.captions * config.steps * 2 * count.forward
    return "evaluate", count.teacher, 2 * config.batch * count.state, 0, drawn


def _sparsify(count: Count, config: SparsifyConfig) -> tuple[str, float, float, float, float]:
    """As `needs` counts every stage: (name, bytes that are certain, bytes more, bytes on disk,
    FLOPs); those in float64 count as many as would take the same time."""
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
    return (
        "sparsify",
        sure,
        WORKING_COPIES * EXACT * max((r * c for r, c in maps), default=0),
        disk,
        flops,
    )


def _places(count: Count, config: SparsifyConfig) -> tuple[Place, ...]:
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


_OF = {
    CalibrateConfig: _calibrate,
    ProbeConfig: _probe,
    DetectConfig: _detect,
    DistillDepthConfig: _distill_depth,
    DetectWidthConfig: _detect_width,
    DistillWidthConfig: _distill_width,
    PolishConfig: _polish,
    VariantsConfig: _variants,
    FinetuneConfig: _finetune,
    ExportConfig: _export,
    SparsifyConfig: _sparsify,
    EvaluateConfig: _evaluate,
}
