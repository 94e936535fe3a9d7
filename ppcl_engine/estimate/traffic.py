"""Bytes that a stage reads and writes: how often it walks the model's file, and what it keeps on
disk on the way.

At full size this is what decides how long a streamed stage takes, and how much of a disk's life.
Each function follows the loops of its stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..algorithms.detection.curves import FIT, STREAMS
from ..algorithms.distillation.kept_trainers import SHARE, rounds_between_saves
from ..models.storing import MIXED
from ..settings.assess_settings import EvaluateConfig
from ..settings.convert_settings import AdaptLoraConfig, ExportConfig, JobConfig, SparsifyConfig
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
from ..system.machine import free_memory
from .counts import ADAPTING_PASSES, EXACT, FP32, NAMED_VARIANTS, SAVED_COPIES, Count
from .detect_chains import DetectChains
from .export_demands import exported_bytes
from .round_states import RoundStates
from .tuning_counts import bytes_a_parameter, share_of_steps
from .width_counts import WidthCounts, measuring_walks


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a stage reads and writes."""

    walks: float = 1
    """how often all blocks are read where they are streamed"""
    resident_walks: float = 1
    """how often, where they stay in memory"""
    read: float = 0
    """bytes of other files"""
    written: float = 0
    """bytes of files, and of those that do not stay"""
    states_read: float = 0
    """bytes of states between blocks, which are on disk where blocks are streamed"""
    states_written: float = 0
    """bytes of the same"""

    def total(self, count: Count, streamed: bool) -> tuple[float, float]:
        """Bytes that are read, bytes that are written."""
        walks = self.walks if streamed else self.resident_walks
        read = min(walks, 1) * count.stored_outer + walks * count.stored_blocks + self.read
        if not streamed:
            return read, self.written
        return read + self.states_read, self.written + self.states_written


def traffic(count: Count, config: JobConfig) -> tuple[float, float]:
    """Bytes that the stage reads, bytes that it writes."""
    return TRAFFIC[type(config)](count, config).total(count, config.streamed)


def _calibrate(count: Count, config: CalibrateConfig) -> Traffic:
    latents, text = count.latents, count.text
    finished = 2 * config.samples * (2 * latents + text)  # batch by batch, then in one file
    if config.images:
        return Traffic(written=finished)
    groups = max(1, math.ceil(2 * count.state * config.samples / (config.cache_gb * 1e9)))
    saved = config.steps * config.samples * 2 * latents if config.streamed else 0
    return Traffic(
        walks=config.steps * groups,
        resident_walks=2,  # one sample first, to see that the model is sound
        written=finished + saved,
    )


def _probe(count: Count, config: ProbeConfig) -> Traffic:
    states, batch = count.kept(count.samples.count), count.samples.batch * count.state
    held = min(config.held_out * batch, states)
    for_streams = 2 * states
    if config.train_steps:
        for_streams += 2 * config.train_steps * batch + 2 * held
    probes = count.blocks * len(STREAMS) * FP32 * count.width**2
    share = count.share_on_disk(states)
    return Traffic(
        written=probes,
        states_written=share * (count.blocks + 1) * states,
        states_read=share * count.blocks * (states + len(STREAMS) * for_streams),
    )


def _detect(count: Count, config: DetectConfig) -> Traffic:
    chains, last = DetectChains.of(count, config), count.blocks - 1
    states, held = chains.states, chains.held_out * chains.batch
    groups, pairs = chains.groups, chains.pairs
    probes = sum(len({k for p in g for k in range(p.u + 1, p.end + 1)}) for g in groups)
    numbers = config.bootstrap + 1 + chains.held_out * count.samples.batch + len(STREAMS) * len(FIT)
    curves = EXACT * count.blocks * config.longest * numbers
    walked = states * sum(end > u for u, end in chains.ends.items()) + pairs * held
    fitted = 2 * pairs * (states - held)
    return Traffic(
        walks=1 + sum(last - group[0].u for group in groups) / count.blocks,
        read=probes * len(STREAMS) * FP32 * count.width**2,
        written=min(len(groups), last) * curves,
        states_written=(count.blocks + 1) * states,
        states_read=(count.blocks + 2) * states + walked + fitted + config.local * pairs * states,
    )


def _distill_depth(count: Count, config: DistillDepthConfig) -> Traffic:
    intervals, states = count.intervals, RoundStates.of(count, config, count.interval_ends)
    students = [count.sizes.student(interval) for interval in intervals]
    last = max(map(max, states.read))
    read, written = _trainings(students, config.rounds)
    fitted = states.used(states.batches) if config.correction != "none" else 0
    begun = len(intervals) * count.stored_blocks / count.blocks
    swept = config.rounds * states.swept(last)
    return Traffic(
        walks=config.rounds * last / count.blocks,
        read=read + begun,
        written=written,
        states_written=swept,
        states_read=swept + config.rounds * states.used(config.updates) + fitted,
    )


def _trainings(parameters: list[int], rounds: int) -> tuple[float, float]:
    """Bytes read and written of trainings that take turns: kept in memory as far as it goes, else
    in files."""
    limit, kept, filed = SHARE * free_memory(), 0, 0
    for number in parameters:
        size = SAVED_COPIES * FP32 * number
        kept, filed = (kept + size, filed) if kept + size <= limit else (kept, filed + size)
    between = rounds_between_saves(rounds, kept + filed)
    saves = math.ceil(rounds / between)
    return (rounds - 1) * filed, saves * kept + rounds * filed


def _detect_width(count: Count, config: DetectWidthConfig) -> Traffic:
    width = WidthCounts.of(count, config)
    states = count.kept(count.samples.count)
    read, written = width.swept(states)
    share = count.share_on_disk(states)
    walks = width.walks(config, min(config.samples, count.samples.count))
    return Traffic(
        walks=1 + sum(last + 1 for last in width.sweeps) / count.blocks + walks,
        read=width.students_read() + (1 + walks) * width.students,
        states_written=share * ((count.blocks + 1) * states + written) + width.solutions,
        # the alignment looks at every place once more
        states_read=share * ((count.blocks + width.places) * states + read) + width.solutions,
    )


def _distill_width(count: Count, config: DistillWidthConfig) -> Traffic:
    width, states = WidthCounts.of_plan(count, config), count.kept(count.samples.count)
    read, written = width.swept(states)
    filed, saved = _trainings([parts * count.width**2 for parts in width.parts], config.rounds)
    fresh = RoundStates.of(count, config, width.boundaries)
    walked = max(map(max, fresh.read))  # no round goes further
    share, swept = count.share_on_disk(states), config.rounds * fresh.swept(walked)
    # a batch is read once more for what its maps read and give
    updates = config.rounds * fresh.used(config.updates + fresh.batches)
    solutions = FP32 * sum(width.parts) * count.width**2  # saved as step 0, and read again
    return Traffic(
        walks=(sum(last + 1 for last in width.sweeps) + config.rounds * walked) / count.blocks,
        read=config.rounds * width.frozen + filed + solutions + width.students_read(),
        written=saved + solutions,
        states_written=share * written + solutions + swept,
        states_read=share * read + swept + updates,
    )


def _tuned(count: Count, config: PolishConfig | FinetuneConfig) -> Traffic:
    """A step reads all blocks for the teacher, and those that stay frozen for the model in training
    and for its gradients. What waits on disk is read for the forward (weights alone) and for its
    step, written behind it, and read once more when it is saved."""
    saves, frozen = math.ceil(config.steps / config.save_every), 0.0
    weights = FP32 * count.trained(config)
    all_kept = bytes_a_parameter(config) * count.trained(config)
    if isinstance(config, PolishConfig):
        replaced = sum(len(interval.blocks) for interval in count.intervals) / count.blocks
        frozen = 1 - share_of_steps(config) * replaced
    on_disk = config.offload == "disk" and not count.shards
    turns = config.steps * share_of_steps(config) if on_disk else 0
    states = config.steps * count.tuning_states() if on_disk else 0
    return Traffic(
        walks=config.steps * (1 + 2 * frozen),
        written=saves * all_kept,
        states_written=turns * all_kept + states,
        states_read=turns * (weights + all_kept) + (saves * all_kept if on_disk else 0) + states,
    )


def _variants(count: Count, config: VariantsConfig) -> Traffic:
    """Walks of the teacher, of each interval alone, and of the named sizes, if those are others."""
    states = min(config.samples, count.samples.count) * count.state
    intervals, single = count.intervals, len(count.intervals) == 1
    named = 0 if single else min(NAMED_VARIANTS - 2, len(intervals))
    named += 1 if count.plan is None or count.plan.sites else 0
    models = [number for number in (len(intervals), named) if number]
    walks = sum(measuring_walks(number, states, config.cache_gb) - 1 for number in models)
    # a block is not read where all models have a student in its place
    gone = len(models) * (intervals[0].removed + 1) / count.blocks if single else 0
    students = FP32 * sum(count.sizes.student(interval) for interval in intervals)
    return Traffic(walks=1 + walks - gone + 1 / count.blocks, read=len(models) * students)


def _export(count: Count, config: ExportConfig) -> Traffic:
    """A bundle holds a hash of every tensor of the teacher. Chosen and refitted formats take a walk each."""
    gone = 0 if config.layout == "bundle" else sum(i.removed + 1 for i in count.intervals)
    walks = (1 + (config.store == MIXED) + config.refit) * (1 - gone / count.blocks)
    return Traffic(
        walks=walks,
        resident_walks=walks,
        read=sum(count.students) * FP32,
        written=exported_bytes(count, config),
    )


def _adapt_lora(count: Count, config: AdaptLoraConfig) -> Traffic:
    """Both teachers pass every block with one reading of it. A place reads what it is to give and its
    input with every forward."""
    states, places = count.kept(count.samples.count), len(count.intervals)
    share = count.share_on_disk(states)
    swept = 2 * (count.blocks + len(count.interval_ends)) * states
    update = 2 * count.samples.batch * count.state
    fitted = places * (2 * ADAPTING_PASSES * states + config.updates * update)
    return Traffic(
        read=FP32 * sum(count.sizes.student(interval) for interval in count.intervals),
        states_written=share * (swept + 2 * places * states),
        states_read=share * (swept + fitted),
    )


def _evaluate(count: Count, config: EvaluateConfig) -> Traffic:
    forwards = math.ceil(config.captions / config.batch) * config.steps * 2 + count.batches
    return Traffic(walks=NAMED_VARIANTS * forwards)


def _sparsify(count: Count, config: SparsifyConfig) -> Traffic:
    """Every pruned block is a file of its own first, which the next block's inputs are made with."""
    states = count.kept(count.samples.count)
    stored, share = count.store(config.store) * count.parameters, count.share_on_disk(states)
    return Traffic(
        read=(2 if config.feed == "pruned" else 1) * stored,
        written=2 * stored,
        states_written=share * (count.blocks + 1) * states,
        states_read=share * 2 * count.blocks * states,
    )


TRAFFIC = {
    CalibrateConfig: _calibrate,
    ProbeConfig: _probe,
    DetectConfig: _detect,
    DistillDepthConfig: _distill_depth,
    DetectWidthConfig: _detect_width,
    DistillWidthConfig: _distill_width,
    PolishConfig: _tuned,
    VariantsConfig: _variants,
    FinetuneConfig: _tuned,
    ExportConfig: _export,
    AdaptLoraConfig: _adapt_lora,
    SparsifyConfig: _sparsify,
    EvaluateConfig: _evaluate,
}
