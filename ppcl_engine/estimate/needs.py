"""What a stage will take: memory of its device, disk, time. From sizes alone; no weights are read.

What is certain is counted apart, so that nothing is refused that would have fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..algorithms.detection.curves import STREAMS
from ..algorithms.sparsity.patterns import UNSTRUCTURED
from ..algorithms.sparsity.source import open_source
from ..models.layout import Place, full_layout
from ..settings.assess_settings import EvaluateConfig
from ..settings.base_settings import StatesConfig
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
from ..system.machine import DTYPES, flops_a_second, resolve_device
from .counts import (
    EXACT,
    FP32,
    NAMED_VARIANTS,
    OPTIMISER_COPIES,
    SAVED_COPIES,
    Count,
)
from .demand import Demand
from .detect_chains import DetectChains
from .export_demands import bits_demand, exported_bytes
from .lora_demand import adapt_lora
from .round_states import RoundStates
from .traffic import traffic
from .tuning_counts import bytes_a_parameter
from .width_counts import WidthCounts

BYTES_A_SECOND = 5e8  # of a disk
GATHERED_COPIES = 4  # of a block: gathered, on the way there, gradients, on their way to the shards
WORKING_COPIES = 8  # of a map in float64: masks' prices, what went, the refit's directions
SOLVING = 5  # products of two maps
COMPRESSED = {"2:4": 9 / 16}
SCORING, MOVING, EXCHANGING, REFITTING = 5, 32, 8, 33
"""Products of a map with its Gram matrix that shares, budgets of clusters, exchanges and refit
take, at most or about."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a stage takes on this machine."""

    stage: str
    memory: int
    """bytes of its device"""
    at_least: int
    """those of them that are certain"""
    host: int
    """bytes in the host's memory that are certain, of what waits for its turn on the device"""
    disk: int
    """bytes of new files that are certain"""
    read: int
    """bytes, from files of weights, of states and of trainings"""
    written: int
    """bytes; more than `disk` where files are written again or do not stay"""
    flops: float
    """of products in float64 as many as would take the same time"""
    seconds: float
    """of an idle machine; more where blocks are small"""


def needs(config: JobConfig, calibrate: CalibrateConfig | None = None, processes: int = 1) -> Needs:
    """`calibrate`: of the same job, where its calibration is not there yet; with neither, the
    smallest one counts. `processes`: how many polish or finetune is launched in; memory, bytes read
    and time are those of each."""
    stage, demand_of = DEMANDS[type(config)]
    count = Count(config, calibrate, processes)
    demand, (read, written) = demand_of(count, config), traffic(count, config)
    speed = flops_a_second(resolve_device(config.device), DTYPES[config.dtype])
    return Needs(
        stage=stage,
        memory=int(demand.certain + demand.likely),
        at_least=int(demand.certain),
        host=int(demand.host),
        disk=int(demand.disk),
        read=int(read),
        written=int(written),
        flops=demand.flops,
        seconds=demand.flops / speed + (read + written) / BYTES_A_SECOND,
    )


def _calibrate(count: Count, config: CalibrateConfig) -> Demand:
    samples = count.samples
    # more than parts and then one file of latents and embeddings take
    disk = 2 * samples.count * count.state
    if config.images:  # one sample goes through the model, a block at a time
        return Demand(
            certain=count.sizes.streamed * count.size,
            likely=samples.batch * count.state,
            disk=disk,
            flops=count.forward,
        )
    # with a caption and without
    states = 2 * count.state * (samples.count if config.streamed else samples.batch)
    return Demand(
        certain=count.teacher,
        likely=count.together(config, states),
        disk=disk,
        flops=2 * config.steps * samples.count * count.forward,
    )


def _probe(count: Count, config: ProbeConfig) -> Demand:
    states = count.kept(count.samples.count)
    waiting, on_disk = count.passing(states)
    probes = 2 * FP32 * count.blocks * count.width**2
    tokens = states / count.size / count.width
    fits = count.blocks * tokens * 4 * count.width**2
    return Demand(
        certain=count.teacher + (0 if config.streamed else 2 * states),
        likely=states + count.solving_with_rank + count.on_host(waiting),
        disk=on_disk + probes,
        flops=count.samples.count * count.forward
        + fits
        + _solves(count, config, len(STREAMS) * count.blocks),
    )


def _detect(count: Count, config: DetectConfig) -> Demand:
    chains, states = DetectChains.of(count, config), count.kept(config.samples)
    kept = count.blocks * states
    in_memory, on_disk = (0, kept) if config.streamed else (kept, 0)
    behind = sum(
        count.blocks - 1 - k for u, end in chains.ends.items() for k in range(u + 1, end + 1)
    )
    passes = count.blocks + (1 if config.local else 2) * behind
    fits = chains.pairs * states / count.size / count.width * 3 * count.width**2
    measured = passes * min(config.samples, count.samples.count) * count.forward / count.blocks
    walking = count.on_host(chains.in_memory) if config.streamed else chains.in_memory
    return Demand(
        certain=count.teacher + in_memory,
        likely=2 * states + walking + count.solving,
        disk=on_disk,
        flops=measured + fits + _solves(count, config, len(STREAMS) * chains.pairs),
    )


def _distill_depth(count: Count, config: DistillDepthConfig) -> Demand:
    states = RoundStates.of(count, config, count.interval_ends)
    cache = count.on_host(states.in_memory) if config.streamed else states.most
    largest = max(count.students)
    waiting = count.waiting(SAVED_COPIES * FP32 * (sum(count.students) - largest))
    training = OPTIMISER_COPIES * largest * FP32
    if config.streamed:  # no block of the teacher is there while a student is trained
        certain = max(count.teacher, count.outer + training)
    else:
        certain = count.teacher + training
    return Demand(
        certain=certain,
        likely=cache + count.backward + count.read_in_training(config, largest) + waiting,
        disk=SAVED_COPIES * sum(count.students) * FP32,
        flops=count.rounds(config, len(count.intervals)),
    )


def _detect_width(count: Count, config: DetectWidthConfig) -> Demand:
    states, width = count.kept(count.samples.count), WidthCounts.of(count, config)
    measured = width.layouts * min(config.samples, count.samples.count) * count.state
    waiting, on_disk = count.passing(states)
    fitting = (
        width.equations
        + max(count.solving_with_rank, count.reading_student)
        + count.on_host(waiting)
    )
    measuring = count.on_host(count.together(config, measured)) + count.reading_student
    # candidates begin where they differ from the depth-pruned model, half way in the mean
    forwards = width.layouts / 2 * min(config.samples, count.samples.count)
    forwards += (1 + len(width.sweeps)) * count.samples.count
    in_files = (0, on_disk + width.solutions) if config.streamed else (width.solutions, 0)
    return Demand(
        certain=count.teacher + (0 if config.streamed else 2 * states),
        likely=states + max(fitting, measuring) + count.on_host(in_files[0]),
        disk=in_files[1],
        flops=forwards * count.forward + _solves(count, config, sum(width.parts)),
    )


def _distill_width(count: Count, config: DistillWidthConfig) -> Demand:
    planned = None if count.plan is None else len(count.plan.sites)
    sites = count.blocks // 4 if planned is None or config.sites else planned
    certain, projection = 1 if planned is None else sites, count.width**2 * FP32
    # a streamed teacher's blocks are there while sums are taken, not while maps are solved or trained
    rest = count.outer if config.streamed else count.teacher
    frozen = 2 * min(count.students) * count.size if config.streamed else 0
    waiting = count.waiting(SAVED_COPIES * projection * (certain - 1))
    width = WidthCounts.of_plan(count, config)
    states = RoundStates.of(count, config, width.boundaries)
    cache = count.on_host(states.in_memory) if config.streamed else states.most
    training = rest + frozen + OPTIMISER_COPIES * projection + waiting + cache
    training += count.backward + count.read_in_training(config, count.width**2)
    student = count.reading_student if width.students else 0
    fitting = width.equations + max(count.teacher + student, rest + count.solving_with_rank)
    return Demand(
        certain=count.teacher,
        likely=max(training, fitting) - count.teacher,
        disk=certain * SAVED_COPIES * projection,
        flops=count.rounds(config, sites),
    )


def _tuned(count: Count, config: PolishConfig | FinetuneConfig) -> Demand:
    """Master weights, gradients, moments and average are float32. Streamed, a block's are on the
    device at a time, and the outer layers' where they are trained. Of processes that shard them,
    each has its part, and gathers a block when its turn comes; then --streamed is the teacher."""
    trained, kept = count.trained(config), bytes_a_parameter(config)
    streamed = config.streamed and not count.shards
    waits, again = kept * trained, config.checkpointing or config.streamed
    block = max(count.sizes.blocks) + count.sizes.correction
    here, here_bytes = trained, kept + FP32
    if streamed:
        here_bytes = FP32 * (5 if config.ema else 4)  # of a block in its turn nothing is packed
        outer = count.sizes.cost.outer_parameters if isinstance(config, FinetuneConfig) else 0
        here = block + outer
    read, gathered, passes = here, 0, (5 if again else 4) * config.steps / count.processes
    training = here_bytes * here
    if count.shards:
        training /= count.processes
        read, gathered = block if again else trained, GATHERED_COPIES * FP32 * block
    certain = count.teacher + training
    if streamed and isinstance(config, FinetuneConfig):
        certain = max(count.teacher, count.outer + training)  # blocks are trained when it has run
    activations = (1 if again else count.blocks) * count.backward
    if again and not streamed:  # the inputs of blocks that are computed again
        activations += count.tuning_states()
    in_memory = waits + count.tuning_states() if streamed and config.offload == "memory" else 0
    on_disk = streamed and config.offload == "disk"
    # while a save is written, what it holds goes from the files of the training into it
    saves = 2 if on_disk and config.steps > config.save_every else 1
    return Demand(
        certain=certain + count.on_host(in_memory),
        likely=activations / count.processes + count.read_in_training(config, read) + gathered,
        host=in_memory,
        disk=saves * waits + (count.tuning_states() if on_disk else 0),
        flops=passes * count.samples.batch * count.forward,
    )


def _variants(count: Count, config: VariantsConfig) -> Demand:
    states, models = count.kept(config.samples), len(count.intervals) + NAMED_VARIANTS
    samples = min(config.samples, count.samples.count)
    return Demand(
        certain=count.teacher + states,
        likely=states + count.together(config, models * states) + count.reading_student,
        flops=models * samples * count.forward,
    )


def _export(count: Count, config: ExportConfig) -> Demand:
    """A bundle is written tensor by tensor, other layouts block by block."""
    block = 0 if config.layout == "bundle" else max(count.sizes.blocks) * FP32
    tensor = count.largest_tensor * (FP32 + count.store(config.store))
    memory, states, flops = bits_demand(count, config)
    disk = exported_bytes(count, config) + states
    return Demand(certain=memory, likely=block + tensor, disk=disk, flops=flops)


def _evaluate(count: Count, config: EvaluateConfig) -> Demand:
    return Demand(
        certain=count.teacher,
        likely=2 * config.batch * count.state,
        flops=NAMED_VARIANTS * config.captions * config.steps * 2 * count.forward,
    )


def _sparsify(count: Count, config: SparsifyConfig) -> Demand:
    """FLOPs in float64 count as many as would take the same time."""
    places, cost = _places(count, config), count.sizes.cost
    costs = {place: cost.place(place) for place in places}
    largest = max(places, key=lambda place: costs[place].parameters)
    maps, read = cost.linear_maps(largest, config.skip.replace(",", " ").split())
    states, outer = count.kept(count.samples.count), count.sizes.cost.outer_parameters
    in_memory, on_disk = (0, 2 * states) if config.streamed else (states, 0)
    grams = EXACT * (sum(width**2 for _, width in read) + sum(columns**2 for _, columns in maps))
    parameters = sum(c.parameters for c in costs.values())
    stored = outer + parameters * (1 + COMPRESSED.get(config.pattern, 1))
    passes = (2 if config.feed == "pruned" else 1) * sum(c.flops for c in costs.values())
    watched = len(places) * sum(2 * rows * width**2 for rows, width in read)
    pruned = len(places) * sum(2 * rows * columns**2 for rows, columns in maps) * _products(config)
    weights = (outer + costs[largest].parameters) * count.size
    return Demand(
        certain=weights + grams + states + in_memory,
        likely=WORKING_COPIES * EXACT * max((r * c for r, c in maps), default=0),
        disk=on_disk + DTYPES[config.store].itemsize * stored,
        flops=count.samples.count * (passes + watched) + pruned * _slower(config),
    )


def _places(count: Count, config: SparsifyConfig) -> tuple[Place, ...]:
    """The places of the variant; a model that is known by its name alone is whole."""
    if config.path.is_file():
        return open_source(config.path, config.base, config.variant).layout.places
    return full_layout(count.blocks).places


def _products(config: SparsifyConfig) -> int:
    moving = config.pattern == UNSTRUCTURED and config.granularity == "cluster"
    refitting = config.compensate or config.score == "obs"
    return SCORING + MOVING * moving + EXCHANGING * config.exchange + REFITTING * refitting


def _solves(count: Count, config: StatesConfig | ProbeConfig, maps: int) -> float:
    """FLOPs of ridge solutions in float64: factors, the solution, the rank."""
    return SOLVING * maps * count.width**3 * _slower(config)


def _slower(config: JobConfig) -> float:
    """float64 against the precision in which blocks run."""
    device = resolve_device(config.device)
    return flops_a_second(device, DTYPES[config.dtype]) / flops_a_second(device, torch.float64)


DEMANDS = {
    CalibrateConfig: ("calibrate", _calibrate),
    ProbeConfig: ("probe", _probe),
    DetectConfig: ("detect", _detect),
    DistillDepthConfig: ("distill-depth", _distill_depth),
    DetectWidthConfig: ("detect-width", _detect_width),
    DistillWidthConfig: ("distill-width", _distill_width),
    PolishConfig: ("polish", _tuned),
    VariantsConfig: ("variants", _variants),
    FinetuneConfig: ("finetune", _tuned),
    ExportConfig: ("export", _export),
    AdaptLoraConfig: ("adapt-lora", adapt_lora),
    SparsifyConfig: ("sparsify", _sparsify),
    EvaluateConfig: ("evaluate", _evaluate),
}
