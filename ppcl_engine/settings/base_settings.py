"""Settings that several stages share, and the reading of a run file's tables."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from ..system.wording import known_names, shown
from .ranges import Count, CountOrZero, Device, OutOfRange, Range, Rate, Seed, Settings

LARGEST = 10**300
PATHS_OF_WINDOWS = r"write Windows paths in single quotes, as 'C:\models\x'"


@dataclass(frozen=True, kw_only=True)
class Common(Settings):
    """Settings that all stages of the method have."""

    model: Path
    """The teacher: a diffusers folder, or a ComfyUI single file."""
    run: Path
    """The folder that this stage reads from and writes to."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the blocks; weights in training stay float32, statistics are always float64."""
    streamed: bool = False
    """Read blocks from disk one after the other instead of keeping the whole model in memory."""
    seed: Seed = 0
    """Same seed, same files, same machine: same bits."""
    dry_run: bool = False
    """Only print what the stage would take (blocks, bytes, memory, time a step), resident and
    streamed. Needs no weights: --model may be the name of a known model, such as qwen_image, or a
    folder with a config.json."""


@dataclass(frozen=True, kw_only=True)
class SharedConfig(Common):
    """Stages whose work the processes of `accelerate launch` share; other stages are done by the first
    process alone."""

    parallel: Literal["data", "intervals"] = "data"
    """How several processes share the work. data: each takes its rows of every batch. intervals:
    each takes intervals (projections, blocks) of its own, and the files are bit for bit those of one
    process. With one process the two are the same."""


@dataclass(frozen=True, kw_only=True)
class StatesConfig(Common):
    """Stages that compute statistics and losses on the states between blocks."""

    target_tokens_only: bool = False
    """For an edit model: leave the tokens of its references out of every statistic and every block's
    loss. Errors of the velocity are always of the drawn picture alone."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(SharedConfig):
    """Stages that train parts of the pruned model."""

    quant_aware: Literal["none", "fp8", "int8", "int4"] = "none"
    """In the last tenth of the steps, train linear maps through weights that are rounded to this
    format, for a model that will be stored in it; gradients and files are those of the full
    weights."""


@dataclass(frozen=True, kw_only=True)
class TuningConfig(TrainingConfig):
    """Settings that polish and finetune share. Also with bfloat16 the trained weights and the
    optimiser are float32."""

    parallel: Literal["data", "intervals", "shard"] = "shard"
    """How several processes share the work; each takes its rows of every batch. shard: each keeps
    its part of the weights, gradients, moments and averages (FSDP2), so that more processes need
    less memory each; --streamed then reads only the teacher block by block. data: each keeps all of
    them, which sends less. intervals: not here, as all parts train on one loss."""
    steps: Count = 1000
    """Steps (paper: 1,000)."""
    learning_rate: Rate = 1e-5
    """Peak learning rate (AdamW 0.9, 0.95), cosine to a thirtieth over all steps."""
    warm_up: CountOrZero = 16
    """Steps until the peak learning rate."""
    weight_decay: Rate = 0.02
    """Weight decay of matrices."""
    ema: Annotated[float, Range(0.0, 0.9999)] = 0.999
    """Decay of the averaged weights, which are the result; lower in the first steps. 0 takes the last
    weights instead."""
    checkpointing: bool = False
    """Compute blocks again for their gradients instead of keeping their activations, as --streamed
    always does. The result is the same to the bit."""
    save_every: Count = 100
    """Steps between saves."""
    offload: Literal["memory", "disk"] = "memory"
    """With --streamed: where weights in training, their moments and averages, and the states between
    blocks wait for their turn: in the host's memory, or in files of the run folder. The result is the
    same to the bit. Processes that shard them keep them on their devices, and disk is refused."""
    optimizer_state: Literal["float32", "compact"] = "float32"
    """What the optimiser keeps between steps: float32, or moments in 8 bits and averages in bfloat16,
    8 bytes a parameter with its weight instead of 16. Processes that shard it refuse compact."""

    def __post_init__(self):
        super().__post_init__()
        if self.parallel == "intervals":
            raise ValueError(
                "--parallel intervals: this stage trains all parts on one loss; use --parallel shard"
            )

    @property
    def unshardable(self) -> str:
        """The setting that processes which shard a training cannot go with; "" for none."""
        if self.streamed and self.offload == "disk":
            return "--offload disk"
        return "--optimizer-state compact" if self.optimizer_state == "compact" else ""


@cache
def hints_of(kind: type) -> dict:
    """The type of each field. Cached, because listing jobs or widgets asks hundreds of times."""
    return get_type_hints(kind)


def from_mapping(kind: type, values: dict, where: str):
    """A config from plain values (TOML, JSON). Raises ValueError naming the field that is unknown,
    missing or wrong."""
    hints = hints_of(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(
            f"{where}: unknown setting {shown(unknown[0])}; {known_names(unknown[0], sorted(hints))}"
        )
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{where}: setting {missing[0]!r} is missing")
    given = {
        name: _converted(hints[name], value, f"{where}: {name}") for name, value in values.items()
    }
    try:
        return kind(**given)
    except OutOfRange as error:
        raise ValueError(
            f"{where}: {error.name} = {shown(error.value)}; choose {error.wanted}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _converted(hint, value, where: str):
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(
                f"{where} = {shown(value)}; choose from {', '.join(map(str, get_args(hint)))}"
            )
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{where} = {shown(value)} is not a list of texts")
        return tuple(value)
    kinds = get_args(hint) or (hint,)
    if Path in kinds and isinstance(value, str):
        if not value:
            raise ValueError(f"{where} is empty; give a path")
        if any(character < " " for character in value):
            raise ValueError(
                f"{where} = {shown(value)} has a control character in it; {PATHS_OF_WINDOWS}"
            )
        return Path(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        # an int beyond this has no float; cut it, the range check then refuses it like any other
        return float(max(-LARGEST, min(LARGEST, value)))
    if type(value) not in kinds:
        raise ValueError(
            f"{where} = {shown(value)} is not {' or '.join(getattr(k, '__name__', str(k)) for k in kinds)}"
        )
    return value
