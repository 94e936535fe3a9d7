"""Settings of the stages that make one model file from another."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from ..system.wording import shown
from .base_settings import Common, StatesConfig
from .ranges import CountOrZero, Device, FileName, Limit, Pixels, Range, Rate, Settings

Store = Literal[
    "float32",
    "bfloat16",
    "float8",
    "int8",
    "int8_convrot",
    "mxfp8",
    "nvfp4",
    "w4a4",
    "q8_0",
    "q5_1",
    "q5_0",
    "q4_1",
    "q4_0",
    "mixed",
]
"""precisions of an exported file; the later ones through the packages comfy-kitchen and gguf"""
STRENGTHS = Range(-100.0, 100.0)  # as ComfyUI's LoRA loaders have it


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Common):
    """Write the bundle, or one variant as a file of its own."""

    layout: Literal["bundle", "comfyui", "diffusers", "ppcl", "gguf"] = "bundle"
    """bundle: all variants, needs the base model. comfyui, diffusers, gguf: one variant, renumbered,
    for stock hosts and ComfyUI-GGUF (no corrections). ppcl: one variant with the teacher's indices,
    for this project's loaders."""
    variant: str = "small"
    """The variant to write, unless the layout is bundle. auto, with the store mixed: the intervals
    are chosen too, under the same budget."""
    name: FileName = "pruned"
    """File name without ending: letters, digits, '-', '_'."""
    store: Store = "bfloat16"
    """Precision in the file. float8: linear maps in scaled fp8, as ComfyUI reads it (layout
    comfyui). int8 to w4a4: the blocks' linear maps in ComfyUI's formats (comfyui, ppcl, bundle), for
    hosts that know them. q8_0 to q4_0: in GGUF's. mixed: a format for each matrix, chosen within
    budget_gb by its measured damage (comfyui, ppcl, gguf)."""
    budget_gb: Limit = 0.0
    """With the store mixed: the most GB (a billion bytes) that the file may have."""
    refit: bool = False
    """Let weights make up for the rounding of others, by least squares on the run's calibration set, as
    GPTQ does, without training (mxfp8, nvfp4, q8_0 to q4_0, mixed; not in a bundle)."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig(Settings):
    """Make a bundle or a standalone from a pruned model that the method's authors released."""

    path: Path
    """The released folder: config.json and weights (safetensors or .bin, sharded or not)."""
    base: Path | None = None
    """The teacher it was pruned from: a diffusers folder, or a ComfyUI single file. A bundle needs
    it."""
    run: Path = Path("runs/import")
    """The folder that the file is written to."""
    name: FileName = "released"
    """File name without ending: letters, digits, '-', '_'."""
    layout: Literal["bundle", "ppcl"] = "bundle"
    """bundle: intervals can be given back to the base. ppcl: the released model alone, with the
    teacher's indices."""
    intervals: str = ""
    """The teacher's blocks that were replaced, as '3-4 8-10', if they were not published."""
    legacy_txt_proj: bool = False
    """Read its text projections as P(x), not P(x) + x: an older release under the same names."""
    refit: bool = False
    """Fit the step of each text group anew from the teacher: the authors' exporter wrote one
    group's into several."""
    calibration: Path | None = None
    """The teacher's calibration set, to refit on; by default the one in the run folder."""
    store: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision in the file."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the teacher's blocks while it refits; statistics are always float64."""
    streamed: bool = False
    """Read the teacher's blocks from disk one after the other instead of keeping the whole model in
    memory."""


@dataclass(frozen=True, kw_only=True)
class AdaptLoraConfig(StatesConfig):
    """Carry a LoRA of the full model over to a pruned variant: what belonged to replaced blocks is
    fitted to what replaced them."""

    lora: Path
    """The LoRA, made for the full model: a .safetensors file of any kind that ComfyUI reads."""
    variant: str = "small"
    """The variant that it is for, or intervals and sites as '3-4,8-10,ffn_image:5'."""
    name: FileName = "adapted"
    """File name without ending: letters, digits, '-', '_'."""
    rank: Annotated[int, Range(0, 4096)] = 0
    """Rank of the new pairs; 0 is the LoRA's own in the blocks that were replaced."""
    updates: CountOrZero = 200
    """Updates of a place's pairs after their closed form; 0 keeps the closed form."""
    learning_rate: Rate = 1e-3
    """Peak learning rate (AdamW 0.9, 0.95), cosine to a thirtieth over all updates."""
    warm_up: CountOrZero = 8
    """Updates until the peak learning rate."""


@dataclass(frozen=True, kw_only=True)
class FoldConfig(Settings):
    """Fold away the modulations that read only the timestep: a third of Qwen-Image, without
    training."""

    path: Path
    """What to fold: a diffusers folder, a ComfyUI single file, a bundle or a standalone. With form
    off: the folded file."""
    base: Path | None = None
    """For a bundle: the full model it was made from, which is folded too. With form off: the file
    that was folded."""
    form: Literal["table", "basis", "off"] = "table"
    """table: the model's own values at the timesteps of a schedule, no error. basis: a few
    coefficients for any timestep, within a bound. off: restore the original weights."""
    run: Path = Path("runs/fold")
    """The folder that files and report are written to."""
    name: FileName = "folded"
    """File name without ending: letters, digits, '-', '_'."""
    bound: Annotated[float, Range(1e-6, 0.99)] = 0.01
    """basis: largest allowed relative error of any modulation at any timestep; the smallest rank
    within it is taken."""
    rank: Annotated[int | None, Range(1, 100_000)] = None
    """basis: this rank instead of the one that the bound gives."""
    steps: str = "20"
    """table: numbers of sampling steps, as '8 20', on the schedule of the model's own folder or
    file (else equal steps)."""
    timesteps: str = ""
    """table: timesteps themselves in place of steps, as '1 0.75 0.5 0.25'."""
    height: Pixels = 0
    """table: height of the pictures in pixels, since some schedules depend on it; 0 is the model's
    default."""
    width: Pixels = 0
    """table: width of the pictures in pixels; 0 is the model's default."""
    samples: str = "1 2"
    """table: numbers of samples at once for which its values are the model's own to the last bit; for
    others they differ by a kernel's rounding."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """table: precision that the model will run in (auto, on the command line: bfloat16 on a GPU,
    else float32)."""
    host: Literal["diffusers", "comfyui"] = "diffusers"
    """table: what will run it. diffusers rounds timesteps to the model's precision, ComfyUI does
    not."""
    device: Device = "auto"
    """Where to compute; best where the model will run, since other devices' kernels round
    differently."""


SETTINGS_OF_FORM = {
    "table": ("steps", "timesteps", "height", "width", "samples"),
    "basis": ("bound", "rank"),
    "off": (),
}
"""form of a folding -> the settings that only it reads"""


def unused_settings(config: FoldConfig) -> dict[str, str]:
    """The settings that are given, but that this form does not read, and why."""
    reasons = {
        name: f"--form {config.form} does not read it"
        for form, names in SETTINGS_OF_FORM.items()
        if form != config.form
        for name in names
    }
    if config.timesteps:
        reasons |= dict.fromkeys(("steps", "height", "width"), "--timesteps is given")
    if config.rank is not None:
        reasons["bound"] = "--rank is given"
    given = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    return {name: reason for name, reason in reasons.items() if name in given}


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig(Settings):
    """Set weights of the blocks to zero without training, chosen by what their layers read on a
    calibration set."""

    path: Path
    """What to prune: a diffusers folder, a ComfyUI single file, a standalone, or a bundle."""
    base: Path | None = None
    """For a bundle: the full model it was made from."""
    variant: str | None = None
    """For a bundle: which variant, or intervals and sites as '3-4,8-10,text:51-59'; by default the
    smallest."""
    calibration: Path | None = None
    """The model's calibration set (for a variant, its teacher's); by default the one in the run
    folder."""
    run: Path = Path("runs/sparsify")
    """The folder for the file and its report; an interrupted run goes on from what is there."""
    name: FileName = "sparse"
    """File name without ending: letters, digits, '-', '_'."""
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"
    """unstructured: any weight may go. 2:4: two of every four neighbours stay, for GPUs with
    kernels for it; 4:8: four of eight."""
    sparsity: Annotated[float | None, Range(0.0, 1.0)] = None
    """Share of the weights that go, exact in every layer; by default a half. With 2:4 and 4:8 it is
    always a half."""
    score: Literal["magnitude", "wanda", "ria", "obs", "energy"] = "energy"
    """How weights are ranked. energy balances weights and activations in each layer: a
    reconstruction of arXiv 2607.00927, of which only the abstract is public. obs is SparseGPT, in
    which the weights that stay make up for those that go."""
    granularity: Literal["row", "layer", "cluster"] = "cluster"
    """unstructured: weights compete in a row, in the layer, or in clusters of rows and columns
    between which the budget moves."""
    exchange: bool = True
    """Let weights of a row change places with those that went, as long as the exact error of the
    layer falls. obs then ranks all weights once, beforehand; without it column by column, as
    SparseGPT does."""
    compensate: bool = True
    """Let the weights that stay make up for those that go, whatever the score (obs always does)."""
    permute: bool = False
    """2:4 and 4:8: first reorder channels where the layers before can be reordered too. LoRA files of
    the dense model then do not fit these layers."""
    timesteps: Literal["even", "early"] = "even"
    """How calibration samples are weighted: all the same, or the early steps of a drawing more (as
    OBS-Diff)."""
    feed: Literal["pruned", "dense"] = "pruned"
    """What a block reads on the calibration set: the output of the pruned blocks before it, or of the
    dense ones."""
    skip: str = ""
    """Linear maps that stay dense, by a part of their names, as 'img_mod txt_mod'."""
    store: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision in the file."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which blocks run; statistics are always float64."""
    streamed: bool = False
    """Keep the states between blocks on disk; blocks are always read one after the other."""
    dry_run: bool = False
    """Only print what it would take (memory, bytes, time); --path may be the name of a known model,
    such as qwen_image."""

    @property
    def model(self) -> Path:
        """The full model; for a standalone, the file itself."""
        return self.base or self.path


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Settings):
    """Bake LoRAs into a model, whole or pruned, and write it as a file of its own."""

    path: Path
    """What to merge into: a diffusers folder, a ComfyUI single file, a GGUF file, a standalone, or a
    bundle."""
    lora: tuple[str, ...]
    """A LoRA and its strength, as style.safetensors:0.8 (without a strength: 1); once for each."""
    base: Path | None = None
    """For a bundle: the full model it was made from."""
    variant: str | None = None
    """For a bundle: which variant, or intervals and sites as '3-4,8-10,text:51-59'; by default the
    smallest."""
    run: Path = Path("runs/merge")
    """The folder that the file is written to."""
    name: FileName = "merged"
    """File name without ending: letters, digits, '-', '_'."""
    layout: Literal["same", "comfyui", "diffusers", "ppcl", "gguf"] = "same"
    """same: the model's own; a bundle's variant gets ppcl. comfyui, diffusers, gguf: renumbered, for
    stock hosts and ComfyUI-GGUF (no corrections). ppcl: with the teacher's indices, for this
    project's loaders."""
    store: Store = "bfloat16"
    """Precision in the file, as in export; what the model is stored in does not matter."""
    dry_run: bool = False
    """Only print what of the LoRAs has a place in the model, and what the merge would read and
    write."""

    def __post_init__(self):
        super().__post_init__()
        if not self.loras:
            raise ValueError("--lora is empty; give a LoRA file as FILE:STRENGTH")

    @property
    def loras(self) -> tuple[tuple[Path, float], ...]:
        """(file, strength) of each. Raises ValueError for a strength that is not a number."""
        return tuple(map(lora_given, self.lora))


def lora_given(text: str) -> tuple[Path, float]:
    """ "a.safetensors:0.8" -> (file, 0.8). A colon of a path is not one before a strength."""
    path, colon, strength = text.rpartition(":")
    if not colon or any(part in strength for part in ("/", "\\", ".safetensors")):
        path, strength = text, "1"
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not path or not STRENGTHS.holds(value):
        raise ValueError(f"--lora {shown(text)}: write FILE:STRENGTH, the strength {STRENGTHS}")
    return Path(path), value


JobConfig = Common | SparsifyConfig
"""settings of a stage that can run as a job and that `--dry-run` estimates"""
