"""Settings of the stages of the method: frozen, keyword-only, one docstring a field (the CLI's
help, the nodes' tooltips)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from .base_settings import Common, SharedConfig, StatesConfig, TrainingConfig, TuningConfig
from .ranges import (
    Count,
    CountOrZero,
    Device,
    FileNameOrEmpty,
    Gigabytes,
    GigabytesOrZero,
    Guidance,
    Limit,
    Pixels,
    Range,
    Rate,
    Samples,
    Seed,
    Settings,
    Share,
    Steps,
    TextForm,
)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Let the teacher draw captions, and keep its pictures' latents and the encoded captions in tar
    shards, which calibrate reads. Several processes share the shards."""

    parallel: ClassVar[str] = "intervals"  # each process makes shards of its own

    teacher: Path
    """The model that draws: a diffusers pipeline folder, or a bundled teacher."""
    prompts: Path
    """Text file, one caption a line."""
    out: Path
    """Folder for the shards. The same command goes on where it stopped."""
    shard: Count = 256
    """Pairs in a shard."""
    batch: Count = 4
    """Pictures drawn at once."""
    steps: Steps = 50
    """Sampling steps."""
    guidance: Guidance = 4.0
    """Classifier-free guidance."""
    height: Pixels = 0
    """Height of a picture in pixels; 0 is the model's default."""
    width: Pixels = 0
    """Width of a picture in pixels; 0 is the model's default."""
    store: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the encoded captions in the shards; latents are float32."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the blocks."""
    streamed: bool = False
    """Read blocks from disk one after the other instead of keeping the whole model in memory."""
    seed: Seed = 0
    """Seed of the noise: a picture depends on it and on the caption's place in the file."""


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(Common):
    """Record what the blocks see in real use: latents, timesteps and captions over the whole
    schedule."""

    images: Path | None = None
    """Folder of pictures (.png .jpg .webp .bmp .tif), each with a .txt caption of the same name.
    They are rotated as their EXIF data says; transparent parts become white."""
    references: Path | None = None
    """For an edit model: folder of the pictures that the --images were made from, with the captions as
    instructions: cat.png for cat.png, or cat_1.png and cat_2.png for several. They are cropped to
    the same size. Without --images, each has its .txt instruction beside it and the teacher draws
    the result."""
    prompts: Path | None = None
    """Text file, one caption a line: the teacher draws them, and its states on the way are kept."""
    embeddings: Path | None = None
    """Stored text embeddings (safetensors: text [n, tokens, width], empty [1, tokens, width]; mask
    [n, tokens] for a model that masks text; pooled [n, width] and empty_pooled [1, width] for one
    that reads pooled text). The teacher draws in equal steps, since only a pipeline folder has the
    model's own schedule."""
    shards: str = ""
    """Tar shards, as webdataset lays them out, with braces for several: 'data/{00..99}.tar'. Either of
    pairs that `ppcl data` made, or of pictures, each with a .txt caption of the same name. They are
    read one after the other, up to as many samples as are wanted."""
    samples: Samples = 128
    """Samples to keep; captions and pictures are used again with other timesteps when there are
    fewer."""
    batch: Count = 16
    """Samples that go through a block at once."""
    empty_captions: Share = 0.1
    """Share of samples with an empty caption, since sampling with guidance needs it too."""
    steps: Steps = 20
    """Sampling steps if the teacher draws (prompts, embeddings)."""
    guidance: Guidance = 2.0
    """Classifier-free guidance if the teacher draws."""
    height: Pixels = 0
    """Height of a picture in pixels; 0 is the model's default."""
    width: Pixels = 0
    """Width of a picture in pixels; 0 is the model's default."""
    cache_gb: Gigabytes = 8.0
    """Streamed, if the teacher draws: memory for the states of pictures that are drawn together. A
    step reads the model once for all of them; with less memory, more often. The result is the same
    to the bit."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(SharedConfig, StatesConfig):
    """Fit a linear map to every block and stream: T(x) ~ x + W x + b."""

    ridge: Annotated[float, Range(1e-9, 1.0)] = 1e-4
    """Ridge as a share of each channel's own variance."""
    train_steps: CountOrZero = 50
    """Gradient steps after the ridge solution, as in the paper; kept only where the held-out error
    falls."""
    learning_rate: Rate = 1e-4
    """Learning rate of these steps (Adam)."""
    held_out: Count = 1
    """Batches of the calibration set that are left out of the fit and used to report its error."""


@dataclass(frozen=True, kw_only=True)
class DetectConfig(StatesConfig):
    """Find the intervals that one student can replace."""

    method: Literal["ppcl", "budget"] = "budget"
    """ppcl: the paper's greedy rule on CKA differences. budget: dynamic programme on measured end
    damage."""
    remove: Annotated[int, Range(0, 1000)] = 0
    """Blocks to remove in all (budget); 0 is the paper's share, 25 of 60."""
    longest: Annotated[int, Range(2, 64)] = 8
    """Longest interval considered, in blocks."""
    eps: Annotated[float, Range(0.0, 100.0)] = 0.02
    """ppcl: a rise of D smaller than this share of the curves' scale does not end an interval."""
    max_drop: Annotated[float, Range(0.0, 100.0)] = 0.25
    """ppcl: a first difference above this share of the curves' scale leaves the block single."""
    kernel: Literal["linear", "rbf"] = "linear"
    """Kernel of the alignment."""
    biased: bool = False
    """The biased estimate of HSIC, as in most papers, instead of the debiased one."""
    local: bool = False
    """Compare at the output of block k instead of the model's final image state."""
    tokens: Count = 4
    """Image tokens of each sample that enter the alignment."""
    samples: Samples = 128
    """Calibration samples to measure on; whole batches, at least two."""
    protect: str = ""
    """Blocks that stay, as '0 1 59'."""
    bootstrap: Annotated[int, Range(0, 10_000)] = 200
    """Resamples of the calibration samples behind the stability scores."""
    explain: bool = False
    """Print why each interval ends where it does."""
    cache_gb: Gigabytes = 8.0
    """Streamed: memory for the states of chains that go through the blocks together; with less, the
    blocks are read more often. The curves are the same."""


@dataclass(frozen=True, kw_only=True)
class DistillDepthConfig(TrainingConfig, StatesConfig):
    """Train one student for each interval on the teacher's own states, independently."""

    intervals: str = ""
    """Which intervals of the plan, as '3-4 8-10'; empty is all."""
    init: Literal["first", "middle"] = "first"
    """The block a student starts as: the interval's first (paper) or its middle (the authors'
    code)."""
    correction: Annotated[
        str, TextForm("affine|none|[1-9][0-9]{0,3}", "affine, none or a rank such as 16")
    ] = "affine"
    """What follows a student: affine, a rank such as 16, or none (files for stock hosts)."""
    loss: Literal["direction", "direction_log_norm", "mse"] = "mse"
    """direction is the paper's; direction_log_norm adds magnitude; mse is relative mean squared
    error."""
    rounds: Count = 150
    """Rounds (times updates: the paper's 6,000 steps): one sweep of the teacher over fresh samples,
    then updates of every interval."""
    updates: Count = 40
    """Updates of an interval in a round."""
    learning_rate: Rate = 1e-5
    """Peak learning rate (AdamW 0.9, 0.95), cosine to a thirtieth over all rounds. The default is
    the authors' for 20 B parameters; the demo's 8 M train best with 3e-3."""
    warm_up: CountOrZero = 16
    """Updates until the peak learning rate."""
    weight_decay: Rate = 0.02
    """Weight decay of matrices."""
    cache_gb: GigabytesOrZero = 0.0
    """GB for the states between blocks (disk if streamed, else memory); a round takes as many
    samples as fit. 0: as many as it is meant to have, or as there is room for."""


@dataclass(frozen=True, kw_only=True)
class DetectWidthConfig(StatesConfig):
    """Find the FFNs and runs of text streams that projections can replace in the depth-pruned
    model."""

    share: Annotated[float, Range(0.05, 1.0)] = 0.52
    """Parameters of the smallest variant, intervals and sites on, as a share of the teacher's
    (paper: 10.6 of 20.4 B)."""
    method: Literal["damage", "cka"] = "damage"
    """damage: velocity error a saved parameter, measured site by site. cka: alignment of
    neighbouring layers (paper)."""
    form: Literal["best", "paper", "gated"] = "best"
    """FFN projections: paper (x + P x), gated (P inside norm, modulation and gate), or whichever does
    less damage at a site; ffn_joint has the one that its model has, if it does not have both."""
    kinds: str = "text ffn_image ffn_text ffn_joint"
    """Kinds of sites to consider, if the model has them; ffn_joint belongs to blocks that run text and
    image as one stream."""
    longest: Annotated[int, Range(1, 64)] = 8
    """Longest text group considered, in blocks that stay."""
    samples: Count = 96
    """Calibration samples to measure damage on; fits use all samples."""
    tokens: Count = 4
    """Tokens of each sample that enter the alignment."""
    cache_gb: Gigabytes = 8.0
    """Memory for the normal equations of the fits, then for the states of models that go through
    the blocks together; with less, the blocks are read more often."""


@dataclass(frozen=True, kw_only=True)
class DistillWidthConfig(TrainingConfig, StatesConfig):
    """Train the projections of the plan's width sites independently, starting from the ridge
    solution."""

    sites: str = ""
    """Sites by hand instead of the plan's, as 'ffn_image:2 text:51-59'."""
    form: Literal["paper", "gated"] = "paper"
    """Form of the FFN projections that --sites names."""
    give_back: bool = True
    """Also fit projections for the teacher's own blocks inside replaced intervals, so that an interval
    can be switched back to the teacher while a site is on."""
    rounds: CountOrZero = 50
    """Rounds (times updates: the paper's 2,000 steps); 0 leaves the ridge solutions."""
    updates: Count = 40
    """Updates of a projection in a round."""
    learning_rate: Rate = 1e-5
    """Peak learning rate (AdamW 0.9, 0.95), cosine to a thirtieth over all rounds."""
    warm_up: CountOrZero = 16
    """Updates until the peak learning rate."""
    weight_decay: Rate = 0.0
    """Weight decay of the maps; 0, since they start at a ridge solution."""
    cache_gb: GigabytesOrZero = 0.0
    """GB for the states between blocks (disk if streamed, else memory); a round takes as many
    samples as fit. 0: as many as it is meant to have, or as there is room for."""


@dataclass(frozen=True, kw_only=True)
class PolishConfig(TuningConfig):
    """Train students and projections together on the final velocity, each step with a random subset
    on."""

    variant: str = ""
    """Intervals and sites to train, as '3-4,8-10,text:51-59', or a variant's name; empty is the
    whole plan."""
    all_on: Share = 0.5
    """Share of the steps in which all of them are on; in the others each is on with probability
    1/2."""


@dataclass(frozen=True, kw_only=True)
class VariantsConfig(Common):
    """Measure each interval's damage and make the named variants."""

    most_parameters: Limit = 0.0
    """Also make a variant of at most this many parameters (millions); 0: do not."""
    most_megabytes: Limit = 0.0
    """Also make a variant of at most this many MB of weights; 0: do not."""
    most_milliseconds: Limit = 0.0
    """Also make a variant whose forward takes at most this time; 0: do not."""
    samples: Count = 64
    """Calibration samples to measure on."""
    cache_gb: Gigabytes = 8.0
    """Memory for the states of models that go through the blocks together; with less, the blocks are
    read more often."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TuningConfig):
    """Train all parameters of one variant on the teacher's velocity; the result is a new variant."""

    variant: str = "small"
    """The variant to start from; it is not changed."""
    name: FileNameOrEmpty = ""
    """Name of the new variant: letters, digits, '-', '_'; empty is the old name followed by _tuned."""
    data: Annotated[float, Range(0.0, 1000.0)] = 0.0
    """Weight of the error against the data (noise - clean), if the calibration has the clean
    pictures."""
