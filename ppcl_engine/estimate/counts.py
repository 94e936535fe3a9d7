"""Bytes and FLOPs that the needs of a stage are made of, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from ..algorithms.detection.intervals import PUBLISHED_SHARE
from ..algorithms.distillation.kept_trainers import SHARE
from ..algorithms.distillation.quantization import NONE
from ..algorithms.distillation.round_cache import REUSE
from ..architectures import Architecture
from ..models.cost import CostModel, Grid, largest_pair
from ..models.layout import full_layout
from ..models.opening import model_config
from ..models.stored_layout import transformer_folder
from ..models.storing import BITS
from ..models.streaming import room_for_states
from ..plan import Interval, PruningPlan
from ..run import Run
from ..settings.base_settings import TrainingConfig
from ..settings.convert_settings import JobConfig, SparsifyConfig
from ..settings.prune_settings import (
    CalibrateConfig,
    DistillDepthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
)
from ..system.machine import DTYPES, free_memory, resolve_device
from ..system.tensor_files import TensorFile
from .picture_grids import grid_of

TEXT_TOKENS = 128
# values of one width that a block's backward keeps, counted on diffusers' block
ACTIVATIONS_PER_TOKEN = 40
OPTIMISER_COPIES = 4  # weights, gradients, two moments
SAVED_COPIES = 3  # weights, two moments
SOLVING_COPIES, RANK_COPIES = 7, 5  # of a map in float64
FP32, EXACT = torch.float32.itemsize, torch.float64.itemsize
STORED = torch.bfloat16.itemsize  # of a value in a file that is not there
NAMED_VARIANTS = 5
# forwards of a place's block over all samples while a LoRA is adapted: alone, for three beginnings,
# twice for the closed form, and for what was reached
ADAPTING_PASSES = 7
WEIGHTS = (".safetensors", ".bin")
PUBLISHED_LENGTH = 3  # blocks of an interval


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a calibration set; `batch` go through a block at once."""

    count: int
    batch: int
    grid: Grid
    text_tokens: int
    references: tuple[Grid, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model is made of."""

    architecture: Architecture
    config: dict
    cost: CostModel
    parameters: int
    """of the whole model"""
    blocks: tuple[int, ...]
    """parameters of each block"""
    streamed: int
    """parameters that a streamed teacher holds: its outer part and two blocks that follow each other"""
    correction: int
    """parameters of a student's correction"""
    forward: float
    """FLOPs of a sample through all blocks"""

    def student(self, interval: Interval) -> int:
        return self.blocks[interval.first] + self.correction


@lru_cache(maxsize=16)
def _sizes(
    model: Path, changed: int, grid: Grid, text_tokens: int, references: tuple[Grid, ...]
) -> Sizes:
    """Counted from shapes; `changed`: when the model was, so that a new file counts anew."""
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
        correction=cost.student(Interval(first=0, last=1, correction="affine")).parameters
        - blocks[0],
        forward=sum(block.flops for block in counted),
    )


class Count:
    """Sizes that the stages' needs are made of; bytes unless said otherwise."""

    def __init__(self, config: JobConfig, calibrate: CalibrateConfig | None, processes: int = 1):
        self.config, self.size = config, DTYPES[config.dtype].itemsize
        self.processes = processes
        self.shards = processes > 1 and getattr(config, "parallel", "") == "shard"
        self.samples = _samples(config, calibrate)
        model = Path(config.model)
        changed = model.stat().st_mtime_ns if model.exists() else 0
        self.sizes = _sizes(
            model, changed, self.samples.grid, self.samples.text_tokens, self.samples.references
        )
        self.blocks = self.sizes.architecture.num_blocks(self.sizes.config)
        self.width = self.sizes.architecture.width(self.sizes.config)
        self.parameters, self.forward = self.sizes.parameters, self.sizes.forward

    @cached_property
    def stored(self) -> float:
        """Bytes of a value in the model's files."""
        return stored_bytes(Path(self.config.model)) / self.parameters or STORED

    @property
    def stored_outer(self) -> float:
        """Bytes that the file has of the outer part."""
        return self.sizes.cost.outer_parameters * self.stored

    @property
    def stored_blocks(self) -> float:
        """The same of all blocks."""
        return sum(self.sizes.blocks) * self.stored

    @property
    def batches(self) -> int:
        return math.ceil(self.samples.count / self.samples.batch)

    @property
    def latents(self) -> float:
        """Bytes of a picture's latents."""
        channels = self.sizes.architecture.token_channels(self.sizes.config)
        return FP32 * math.prod(self.samples.grid) * channels

    @property
    def text(self) -> float:
        """Bytes of a caption's embedding."""
        return (
            FP32 * self.samples.text_tokens * self.sizes.architecture.text_width(self.sizes.config)
        )

    def store(self, name: str) -> float:
        """Bytes of a value that is stored in this precision."""
        return BITS[name] / 8

    @cached_property
    def teacher(self) -> int:
        return (self.sizes.streamed if self.config.streamed else self.parameters) * self.size

    @property
    def outer(self) -> int:
        """The teacher's layers outside of its blocks."""
        return self.sizes.cost.outer_parameters * self.size

    @cached_property
    def state(self) -> int:
        """Both streams of one sample."""
        tokens = (
            sum(map(math.prod, (self.samples.grid, *self.samples.references)))
            + self.samples.text_tokens
        )
        return tokens * self.width * self.size

    @property
    def reading_student(self) -> float:
        """What the largest student takes: as its file has it, and as it computes."""
        return max(self.students) * (FP32 + self.size)

    @property
    def largest_tensor(self) -> int:
        """Its values."""
        largest = max(full_layout(self.blocks).places, key=lambda p: self.sizes.blocks[p.index])
        return self.sizes.cost.largest_map(largest)

    @property
    def solving(self) -> float:
        """Bytes that solving a map takes: its sums, their factor, the solution."""
        return SOLVING_COPIES * EXACT * self.width**2

    @property
    def solving_with_rank(self) -> float:
        return self.solving + RANK_COPIES * EXACT * self.width**2

    def passing(self, states: float) -> tuple[float, float]:
        """Where the states of the two boundaries are that a streamed sweep keeps: bytes in the
        host's memory, and bytes on disk."""
        room = room_for_states() if self.config.streamed else 0
        return min(room, 2 * states), max(0, 2 * states - room)

    def share_on_disk(self, states: float) -> float:
        """How much of what passes through a streamed sweep is written and read again."""
        return self.passing(states)[1] / (2 * states)

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

    @property
    def interval_ends(self) -> list[set[int]]:
        """The boundaries at both ends of each; of guessed ones, spread over the model."""
        if self.plan is not None:
            return [{i.first, i.last + 1} for i in self.intervals]
        number = len(self.intervals)
        starts = [n * (self.blocks - 2) // number for n in range(number)]
        return [{start, start + 2} for start in starts]

    @cached_property
    def students(self) -> list[int]:
        """Parameters of those that are certain: the plan's; without one, the smallest."""
        known = self.plan.intervals if self.plan is not None else ()
        return [self.sizes.student(i) for i in known] or [
            min(self.sizes.blocks) + self.sizes.correction
        ]

    def read_in_training(self, config: TrainingConfig, trained: int) -> int:
        """Weights that a forward reads in the place of those in training, which are float32:
        rounded ones, and what mixed precision makes of them."""
        rounded = trained * FP32 if config.quant_aware != NONE else 0
        return rounded + (trained * self.size if self.size < FP32 else 0)

    def kept(self, samples: int) -> int:
        """States of so many samples at one boundary."""
        return min(samples, self.samples.count) * self.state

    def together(self, config, states: int) -> int:
        """Bytes of what goes through the blocks together, if that much is there."""
        return int(min(config.cache_gb * 1e9, states))

    def waiting(self, trainers: int) -> float:
        """Memory of parts whose round is not there yet."""
        return self.on_host(min(SHARE * free_memory(), trainers))

    def on_host(self, size: float) -> float:
        """What this size in the host's memory takes of the device's: nothing of a GPU's."""
        return size if resolve_device(self.config.device) == "cpu" else 0

    def rounds(self, config: DistillDepthConfig | DistillWidthConfig, trained: int) -> float:
        """FLOPs of sweeps and updates; an update is three forwards."""
        sweeps = math.ceil(config.updates / REUSE) * self.forward
        updates = 3 * trained * config.updates * self.forward / self.blocks
        return config.rounds * self.samples.batch * (sweeps + updates)

    def trained(self, config: PolishConfig | FinetuneConfig) -> int:
        """Parameters that are trained together: the plan's students, or all of a variant."""
        if isinstance(config, PolishConfig):
            return sum(self.students)
        return self.variant(config.variant) or self.parameters // 2

    def tuning_states(self) -> int:
        """States of a batch between all blocks."""
        return self.blocks * self.samples.batch * self.state

    def variant(self, name: str) -> int:
        """Parameters of a variant, 0 where it is not known yet."""
        if self.plan is None or name not in {v.name for v in self.plan.variants}:
            return 0
        return self.sizes.cost.variant(
            self.plan, replace(self.plan.variant(name), tuned=False)
        ).parameters


def _samples(config: JobConfig, calibrate: CalibrateConfig | None) -> Samples:
    path = Run(config.run).calibration
    if isinstance(config, SparsifyConfig) and config.calibration is not None:
        path = config.calibration
    calibrate = config if isinstance(config, CalibrateConfig) else calibrate
    if calibrate is not None:
        grid = grid_of(calibrate)
        references = (grid,) if calibrate.references else ()  # one or more
        text, batch = _text_tokens(calibrate), calibrate.batch
        return Samples(
            count=calibrate.samples, batch=batch, grid=grid, text_tokens=text, references=references
        )
    if not path.exists():
        return Samples(count=1, batch=1, grid=(1, 2, 2), text_tokens=1)
    file = TensorFile(path)
    shapes = [file.shape(name) for name in file.keys() if name.endswith(".encoder_hidden_states")]
    count, (batch, text_tokens, _) = sum(s[0] for s in shapes), shapes[0]
    grid, *references = map(tuple, file.read("0.grid").tolist())
    return Samples(
        count=count, batch=batch, grid=grid, text_tokens=text_tokens, references=tuple(references)
    )


def _text_tokens(config: CalibrateConfig) -> int:
    """Tokens of a caption: as stored, or as many as is usual."""
    if config.embeddings is None or not config.embeddings.is_file():
        return TEXT_TOKENS
    return TensorFile(config.embeddings).shape("text")[1]


def stored_bytes(model: Path) -> int:
    """Size of the model's weights; 0 for one that is known by its name alone."""
    if model.is_file():
        return model.stat().st_size
    if not model.is_dir():
        return 0
    weights = [path for path in transformer_folder(model).iterdir() if path.suffix in WEIGHTS]
    return sum(path.stat().st_size for path in weights)
