"""What a stage will take: memory of its device, disk, time. From sizes alone; no weights are read.

`at_least` counts only what is certain (weights, optimiser, states that are kept), so that nothing is refused that
would have fitted; `memory` adds what a backward keeps and a cache of states in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from .architectures import ARCHITECTURES, Architecture
from .codecs import TABLES, open_codec
from .config import (
    CalibrateConfig,
    Common,
    DetectConfig,
    DetectWidthConfig,
    DistillDepthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
    ProbeConfig,
    VariantsConfig,
)
from .config_files import EvaluateConfig, ExportConfig
from .cost import CostModel, Grid, largest_pair
from .files import TensorFile, read_json
from .machine import flops_a_second
from .plan import Interval, PruningPlan
from .quantization import NONE
from .rounds import REUSE
from .run import DTYPES, Run, resolve_device

GRID, TEXT_TOKENS = (1, 64, 64), 128  # 1024 x 1024 pixels
PIXELS_A_TOKEN = 16  # height and width
ACTIVATIONS_PER_TOKEN = 40  # values of one width that a block's backward keeps, counted on diffusers' block
TUNING_COPIES = 5  # weights, gradients, two moments, average
OPTIMISER_COPIES = 4  # weights, gradients, two moments
SAVED_COPIES = 3  # weights, two moments
FP32 = 4
PUBLISHED_SHARE, PUBLISHED_LENGTH = 25 / 60, 3  # blocks removed, blocks of an interval
BYTES_A_SECOND = 5e8  # of a disk
NAMED_VARIANTS = 5


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes on the device, bytes of new files that are certain, seconds of an idle machine (more where blocks are small)."""

    stage: str
    memory: int
    at_least: int
    disk: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Of a calibration set; `batch` go through a block at once."""

    count: int
    batch: int
    grid: Grid
    text_tokens: int
    references: tuple[Grid, ...] = ()


def model_config(model: Path) -> tuple[str, Architecture, dict]:
    """(name, architecture, configuration) of a known model's name, a folder with a config.json, or a model file."""
    for architecture in ARCHITECTURES:
        if str(model) in architecture.model_configs:
            return str(model), architecture, architecture.model_configs[str(model)]
    for folder in (model / "transformer", model):
        if (folder / "config.json").exists():
            return _from_config_file(model, read_json(folder / "config.json"))
    if model.is_file():
        from .checkpoint import Weights

        weights = Weights(model)
        return model.name, weights.architecture, weights.config
    known = ", ".join(name for a in ARCHITECTURES for name in a.model_configs)
    raise ValueError(f"--model {model}: no such file, no folder with a config.json, and not one of {known}")


def _from_config_file(model: Path, values: dict) -> tuple[str, Architecture, dict]:
    for architecture in ARCHITECTURES:
        if values.get("_class_name") == architecture.diffusers_class:
            return model.name, architecture, {k: v for k, v in values.items() if not k.startswith("_")}
    known = ", ".join(a.diffusers_class for a in ARCHITECTURES)
    raise ValueError(f"{model}: class {values.get('_class_name')!r} is unknown; known: {known}")


def needs(config: Common, calibrate: CalibrateConfig | None = None) -> Needs:
    """`calibrate`: of the same job, where its calibration is not there yet; with neither, the smallest one counts."""
    count = _Count(config, calibrate)
    stage, sure, more, disk, flops = _OF[type(config)](count, config)
    speed = flops_a_second(resolve_device(config.device), DTYPES[config.dtype])
    seconds = flops / speed + disk / BYTES_A_SECOND
    return Needs(stage=stage, memory=int(sure + more), at_least=int(sure), disk=int(disk), seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """blocks: parameters of each; streamed: of what a streamed teacher holds, its outer part and two blocks that follow
    each other; correction: of a student's; forward: FLOPs of a sample through all blocks."""

    architecture: Architecture
    config: dict
    cost: CostModel
    parameters: int
    blocks: tuple[int, ...]
    streamed: int
    correction: int
    forward: float

    def student(self, interval: Interval) -> int:
        return self.blocks[interval.first] + self.correction


@lru_cache(maxsize=16)
def _sizes(model: Path, changed: int, grid: Grid, text_tokens: int, references: tuple[Grid, ...]) -> Sizes:
    """Counted on the meta device; `changed`: when the model was, so that a new file counts anew."""
    _, architecture, config = model_config(model)
    cost = CostModel(architecture, config, grid, text_tokens, references)
    counted = cost.blocks()
    blocks = [block.parameters for block in counted]
    return Sizes(
        architecture=architecture,
        config=config,
        cost=cost,
        parameters=cost.outer_parameters + sum(blocks),
        blocks=tuple(blocks),
        streamed=cost.outer_parameters + largest_pair(blocks),
        correction=cost.student(Interval(first=0, last=1, correction="affine")).parameters - blocks[0],
        forward=sum(block.flops for block in counted),
    )


class _Count:
    """Sizes that the stages' needs are made of; bytes unless said otherwise."""

    def __init__(self, config: Common, calibrate: CalibrateConfig | None):
        self.config, self.size = config, DTYPES[config.dtype].itemsize
        self.samples = _samples(config, calibrate)
        model = Path(config.model)
        changed = model.stat().st_mtime_ns if model.exists() else 0
        self.sizes = _sizes(model, changed, self.samples.grid, self.samples.text_tokens, self.samples.references)
        self.blocks = self.sizes.architecture.num_blocks(self.sizes.config)
        self.width = self.sizes.architecture.width(self.sizes.config)
        self.parameters, self.forward = self.sizes.parameters, self.sizes.forward

    @cached_property
    def teacher(self) -> int:
        return (self.sizes.streamed if self.config.streamed else self.parameters) * self.size

    @cached_property
    def state(self) -> int:
        """Both streams of one sample."""
        tokens = sum(map(math.prod, (self.samples.grid, *self.samples.references))) + self.samples.text_tokens
        return tokens * self.width * self.size

    @property
    def backward(self) -> int:
        """What a block keeps of a batch for its gradients."""
        return ACTIVATIONS_PER_TOKEN * self.samples.batch * self.state

    @cached_property
    def plan(self) -> PruningPlan | None:
        run = Run(self.config.run)
        return run.load_plan() if run.plan.exists() else None

    @cached_property
    def intervals(self) -> tuple[Interval, ...]:
        """The plan's; without one, about as many as were published."""
        if self.plan is not None:
            return self.plan.intervals
        guessed = round(self.blocks * PUBLISHED_SHARE / (PUBLISHED_LENGTH - 1))
        return tuple(Interval(first=0, last=1, correction="affine") for _ in range(max(1, guessed)))

    @cached_property
    def students(self) -> list[int]:
        """Parameters of those that are certain: the plan's; without one, the smallest."""
        known = self.plan.intervals if self.plan is not None else ()
        return [self.sizes.student(i) for i in known] or [min(self.sizes.blocks) + self.sizes.correction]

    def rounded(self, trained: int, size: int) -> int:
        """Weights that training reads in the place of its own."""
        return trained * size if self.config.quant_aware != NONE else 0

    def kept(self, samples: int) -> int:
        """States of so many samples at one boundary."""
        return min(samples, self.samples.count) * self.state

    def cache(self, updates: int, cache_gb: float, boundaries: int) -> int:
        """States of a round."""
        return int(min(cache_gb * 1e9, boundaries * self.samples.batch * self.state * math.ceil(updates / REUSE)))

    def rounds(self, config: DistillDepthConfig | DistillWidthConfig, trained: int) -> float:
        """FLOPs of sweeps and updates; an update is three forwards."""
        sweeps = math.ceil(config.updates / REUSE) * self.forward
        updates = 3 * trained * config.updates * self.forward / self.blocks
        return config.rounds * self.samples.batch * (sweeps + updates)

    def variant(self, name: str) -> int:
        """Parameters of a variant, 0 where it is not known yet."""
        if self.plan is None or name not in {v.name for v in self.plan.variants}:
            return 0
        return self.sizes.cost.variant(self.plan, replace(self.plan.variant(name), tuned=False)).parameters


def _calibrate(count: _Count, config: CalibrateConfig):
    samples = count.samples
    disk = 2 * samples.count * count.state  # more than parts and then one file of latents and embeddings take
    if config.images:
        return "calibrate", 0, samples.batch * count.state, disk, 0
    drawn = 2 * config.steps * samples.count * count.forward
    return "calibrate", count.teacher, samples.batch * count.state, disk, drawn


def _probe(count: _Count, config: ProbeConfig):
    states = count.kept(count.samples.count)
    here, disk = (0, 2 * states) if config.streamed else (2 * states, 0)
    disk += 2 * FP32 * count.blocks * count.width**2
    tokens = states / count.size / count.width
    fits = count.blocks * tokens * 4 * count.width**2
    return "probe", count.teacher + here, states, disk, count.samples.count * count.forward + fits


def _detect(count: _Count, config: DetectConfig):
    states = count.kept(config.samples)
    here, disk = (0, count.blocks * states) if config.streamed else (count.blocks * states, 0)
    sections = count.sizes.architecture.sections(count.sizes.config)
    pairs = [count.blocks - 1 - k for s in sections for u in s for k in s if u < k < u + config.longest]
    passes = count.blocks + (1 if config.local else 2) * sum(pairs)
    fits = len(pairs) * states / count.size / count.width * 4 * count.width**2
    measured = passes * min(config.samples, count.samples.count) * count.forward / count.blocks
    return "detect", count.teacher + here, 2 * states, disk, measured + fits


def _distill_depth(count: _Count, config: DistillDepthConfig):
    boundaries = 2 * len(count.intervals) + 2
    cache = 0 if config.streamed else count.cache(config.updates, config.cache_gb, boundaries)
    disk = SAVED_COPIES * sum(count.students) * count.size
    sure = count.teacher + OPTIMISER_COPIES * max(count.students) * count.size
    more = cache + count.backward + count.rounded(max(count.students), count.size)
    return "distill-depth", sure, more, disk, count.rounds(config, len(count.intervals))


def _detect_width(count: _Count, config: DetectWidthConfig):
    states, equations = count.kept(count.samples.count), 4 * 8 * count.width**2
    fits = 2 * count.blocks
    here, disk = (0, 2 * states) if config.streamed else (2 * states, 0)
    more = states + min(config.cache_gb * 1e9, fits * equations)
    flops = (fits * config.samples + 2 * count.samples.count) * count.forward
    return "detect-width", count.teacher + here + equations, more, disk, flops


def _distill_width(count: _Count, config: DistillWidthConfig):
    sites = len(count.plan.sites) if count.plan is not None and not config.sites else count.blocks // 4
    cache = 0 if config.streamed else count.cache(config.updates, config.cache_gb, 4 * sites)
    certain = sites if count.plan is not None else 1
    sure = count.teacher + (OPTIMISER_COPIES * count.width**2 + 2 * min(count.students)) * count.size
    disk = certain * SAVED_COPIES * count.width**2 * count.size
    more = cache + count.backward + count.rounded(count.width**2, count.size)
    return "distill-width", sure, more, disk, count.rounds(config, sites)


def _polish(count: _Count, config: PolishConfig):
    return "polish", *_tuned(count, config, sum(count.students))


def _finetune(count: _Count, config: FinetuneConfig):
    return "finetune", *_tuned(count, config, count.variant(config.variant) or count.parameters // 2)


def _tuned(count: _Count, config: PolishConfig | FinetuneConfig, trained: int):
    """Master weights, gradients, moments and average are float32."""
    kept = (1 if config.checkpointing else count.blocks) * count.backward + count.rounded(trained, FP32)
    flops = 4 * config.steps * count.samples.batch * count.forward
    disk = 4 * FP32 * trained  # used and raw weights, two moments
    return count.teacher + TUNING_COPIES * FP32 * trained, kept, disk, flops


def _variants(count: _Count, config: VariantsConfig):
    states = count.kept(config.samples)
    flops = (len(count.intervals) + NAMED_VARIANTS) * min(config.samples, count.samples.count) * count.forward
    return "variants", count.teacher + states, 2 * states, 0, flops


def _export(count: _Count, config: ExportConfig):
    stored = sum(count.students) if config.layout == "bundle" else count.variant(config.variant)
    itemsize = 1 if config.store == "float8" else DTYPES[config.store].itemsize
    return "export", 0, max(count.sizes.blocks) * FP32, stored * itemsize, 0


def _evaluate(count: _Count, config: EvaluateConfig):
    drawn = NAMED_VARIANTS * config.captions * config.steps * 2 * count.forward
    return "evaluate", count.teacher, 2 * config.batch * count.state, 0, drawn


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
    EvaluateConfig: _evaluate,
}


def _samples(config: Common, calibrate: CalibrateConfig | None) -> Samples:
    path = Run(config.run).calibration
    calibrate = config if isinstance(config, CalibrateConfig) else calibrate
    if calibrate is not None:
        grid = _grid(calibrate)
        references = (grid,) if calibrate.references else ()  # one or more
        text, batch = TEXT_TOKENS, calibrate.batch
        return Samples(count=calibrate.samples, batch=batch, grid=grid, text_tokens=text, references=references)
    if not path.exists():
        return Samples(count=1, batch=1, grid=(1, 2, 2), text_tokens=1)
    file = TensorFile(path)
    shapes = [file.shape(name) for name in file.keys() if name.endswith(".encoder_hidden_states")]
    count, (batch, text_tokens, _) = sum(s[0] for s in shapes), shapes[0]
    grid, *references = map(tuple, file.read("0.grid").tolist())
    return Samples(count=count, batch=batch, grid=grid, text_tokens=text_tokens, references=tuple(references))


def _grid(config: CalibrateConfig) -> tuple[int, int, int]:
    """Of the pictures that calibrate will draw or read: as asked for, or the model's own size where it is cheap to know."""
    (rows, columns), pixels = GRID[1:], PIXELS_A_TOKEN
    if Path(config.model).is_file() and set(TABLES) <= set(TensorFile(config.model).entries):
        codec = open_codec(config.model)
        pixels = 2 * codec.pixels_per_latent
        rows, columns = (side // pixels for side in codec.picture_size)
    return 1, config.height // pixels or rows, config.width // pixels or columns
