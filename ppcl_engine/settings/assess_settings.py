"""Settings of the stages that measure, draw and demonstrate, and of `ppcl run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .base_settings import Common
from .ranges import Count, Device, Guidance, Pixels, Range, Seed, Settings, Steps


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Common):
    """Compare variants with the teacher at the same seeds, and write report.html; or judge them on a
    public benchmark."""

    captions: Count = 100
    """Pictures drawn a variant."""
    prompts: Path | None = None
    """Captions to draw, one a line; the bundled teachers draw random captions of their
    own task by default. With --benchmark, its own file."""
    benchmark: Literal["none", "dpg", "geneval", "longtext", "oneig", "t2i_compbench"] = "none"
    """Draw and judge the prompts of a public benchmark instead, from its own file (docs/judging.md),
    and write benchmarks.html; of more prompts than --captions, as many, spread over the file."""
    judge: Path | None = None
    """With --benchmark: folder of a vision-language model for transformers, such as Qwen2.5-VL or
    Qwen3-VL, which answers questions about the pictures and reads them."""
    references: Path | None = None
    """For an edit model, instead of captions: folder of pictures to change, each with a .txt
    instruction of the same name."""
    steps: Steps = 20
    """Sampling steps."""
    guidance: Guidance = 2.0
    """Classifier-free guidance."""
    batch: Count = 50
    """Pictures at once."""
    variants: str = ""
    """Names, separated by commas; empty is every named variant."""
    height: Pixels = 0
    """Height of a picture in pixels; 0 is the model's default."""
    width: Pixels = 0
    """Width of a picture in pixels; 0 is the model's default."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Settings):
    """Draw pictures with any model file or bundle."""

    path: Path
    """Bundle, standalone, diffusers folder or single file."""
    prompt: str
    """What to draw; several captions are separated by '|'."""
    base: Path | None = None
    """The base model of a bundle; also where text encoder and VAE come from."""
    references: str = ""
    """For an edit model: the pictures that every caption changes; several paths are separated by
    '|'."""
    variant: str | None = None
    """Variant of a bundle."""
    output: Path = Path("runs/generate.png")
    """The picture to write: .png, .jpg or .jpeg."""
    steps: Steps = 20
    """Sampling steps."""
    guidance: Guidance = 2.0
    """Classifier-free guidance."""
    seed: Seed = 0
    """Noise."""
    height: Pixels = 0
    """Height of a picture in pixels; 0 is the model's default."""
    width: Pixels = 0
    """Width of a picture in pixels; 0 is the model's default."""
    device: Device = "auto"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Settings):
    """Print what a file holds, or which architectures are known."""

    path: Path | None = None
    """Bundle, standalone, diffusers folder, released folder or single file."""
    legacy_txt_proj: bool = False
    """Read the text projections of a released folder as P(x), not P(x) + x: an older release under
    the same names."""
    architectures: bool = False
    """List the known full-size models, counted without weights."""
    verify: bool = False
    """Read every tensor and compare it with the hash stored in the file, if it stores hashes."""
    base: Path | None = None
    """With --verify, for a bundle: the full model that it was made from, whose tensors are all
    compared too."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Settings):
    """Time a forward of each variant on random inputs, interleaved, on this machine."""

    path: Path
    """Bundle, standalone, diffusers folder or single file."""
    base: Path | None = None
    """The base model of a bundle."""
    rows: Annotated[int, Range(1, 1024)] = 6
    """Rows of image tokens (a token covers 16 pixels of a full-size model)."""
    columns: Annotated[int, Range(1, 1024)] = 6
    """Columns of image tokens."""
    text_tokens: Annotated[int, Range(1, 2048)] = 9
    """Text tokens."""
    batch: Count = 1
    """Samples at once."""
    repeats: Count = 10
    """Forwards a variant; the median counts."""
    device: Device = "auto"
    """Where to compute."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """The whole method on a bundled teacher: calibrate to report, no download."""

    run: Path | None = None
    """The folder for all files; by default runs/demo, or runs/demo_flux."""
    teacher: Literal["qwen", "flux"] = "qwen"
    """The small teacher: Qwen-Image's architecture, or FLUX's (double and single blocks)."""
    device: Device = "auto"
    """Where to compute."""
    seed: Seed = 0
    """Seed of every stage."""
    captions: Count = 200
    """Pictures drawn a variant in the evaluation."""
    quick: bool = False
    """Use as few samples and updates as possible, to see in a minute that everything runs; the figures
    mean nothing."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """Run the stages that a TOML file names, in its order; [common] holds what they share."""

    file: Path
    """The file: tables named as the stages are, with their settings."""
    tiny: bool = False
    """Run it in minutes on the bundled teacher that the file's [tiny] names, with few samples and
    steps, to see that the file is right; the figures mean nothing."""
    dry_run: bool = False
    """Only print what each stage would take on this machine, and all of them together. Needs no
    weights."""
