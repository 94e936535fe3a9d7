"""The text encoder, VAE and schedule of a diffusers pipeline folder; models are loaded when needed
and released.

Prompts go through the pipeline's own `encode_prompt`, timesteps through its own scheduler, so none
of that is written again here. The transformer is never loaded: models/weights.py reads it.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ...architectures import Inputs
from ...architectures.modules import AnyModule
from ...system.schemas import read_checked_object
from ...system.tensor_files import TensorFile
from ..flow import euler_timesteps
from .base import check_references
from .pipeline_files import PooledVAE, Scheduler

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)
SCHEDULER_FILE = "scheduler/scheduler_config.json"
LATENT_SIDE = 128  # default_sample_size of the pipelines
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
"""a tokenizer folder holds one of these; transformers reads an empty folder without complaint"""
TEXT_TOKENS = 512  # the limit of the pipeline's call; longer prompts are cut there too
TEXTS_AT_ONCE = 8  # the text encoder also computes 152,000 logits for every token


class PipelineCodec:
    """A `Codec` (base.py) for the folder that a diffusers pipeline's `from_pretrained` reads.

    Computes in bf16 on a CUDA device and in fp32 elsewhere; takes and returns fp32 on the CPU.
    Raises ValueError for a folder with a part missing or unreadable.
    """

    rescales_guidance: ClassVar[bool] = False
    edits: ClassVar[bool] = False
    vae_schema: ClassVar[type] = PooledVAE
    latent_side: ClassVar[int] = LATENT_SIDE
    text_parts: ClassVar[tuple[str, ...]]
    """files of the text encoders and tokenizers, in the order in which they are looked for"""

    def __init__(self, folder: Path, device: str = "cpu"):
        self.folder, self.device = Path(folder), device
        self.dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
        _check_layout(self.folder, self.text_parts)
        self.latent_channels, self.pixels_per_latent = self._sizes(self._vae_config())
        side = self.latent_side * self.pixels_per_latent
        self.picture_size = (side, side)
        self._text_pipeline = None
        self._vae = None

    def timesteps(self, steps: int, image_tokens: int) -> list[float]:
        """The pipeline's own, shifted for the picture's size. Raises ValueError for fewer steps
        than the shift needs."""
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        scheduler: AnyModule = FlowMatchEulerDiscreteScheduler.from_config(
            read_checked_object(self.folder / SCHEDULER_FILE, Scheduler)
        )
        config = scheduler.config
        # the shift stretches the range from the first timestep to the last
        if config.shift_terminal and steps < 2:
            raise ValueError(
                f"{self.folder / SCHEDULER_FILE} has a shift_terminal, which needs 2 steps; raise --steps"
            )
        lengths = config.base_image_seq_len, config.max_image_seq_len
        shift = calculate_shift(image_tokens, *lengths, config.base_shift, config.max_shift)
        retrieve_timesteps(scheduler, **self._spacing(steps), mu=shift)
        return scheduler.sigmas.tolist()

    def text(self, texts: list[str], references: torch.Tensor | None = None) -> Inputs:
        check_references(self.edits, references is not None, self.folder)
        return self._text(texts)

    def _text(self, texts: list[str]) -> Inputs:
        raise NotImplementedError

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] -> [n, channels, H/8, W/8], about unit variance: the mode of the VAE's
        posterior"""
        vae = self._open_vae()
        pictures = self._framed(2 * pictures - 1).to(self.device, self.dtype)
        with torch.no_grad():
            mode = vae.encode(pictures).latent_dist.mode().float().cpu()
        mean, deviation = self._statistics(vae, mode)
        return self._still((mode - mean) / deviation)

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """[n, channels, h, w] -> [n, 3, 8h, 8w], clipped to [0, 1], decoded as in the pipeline's
        call"""
        vae = self._open_vae()
        latents = self._framed(latents).to(self.device, self.dtype)
        mean, deviation = self._statistics(vae, latents)
        with torch.no_grad():
            decoded = vae.decode(latents / (1 / deviation) + mean).sample
        return (self._still(decoded).float().cpu() / 2 + 0.5).clamp(0, 1)

    def release(self) -> None:
        """Frees the text encoder and the VAE; the next call that needs one loads it again."""
        self._text_pipeline = self._vae = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _spacing(self, steps: int) -> dict:
        """How the pipeline's call asks its scheduler for timesteps: equal steps before the
        shift."""
        return {"sigmas": euler_timesteps(steps)[:-1]}

    def _vae_config(self) -> dict:
        return read_checked_object(self.folder / "vae" / "config.json", self.vae_schema)

    def _sizes(self, config: dict) -> tuple[int, int]:
        """Channels of a latent, pixels a side that one covers."""
        raise NotImplementedError

    def _statistics(self, vae: AnyModule, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents' mean and standard deviation, on the device and in the dtype of `like`."""
        raise NotImplementedError

    def _framed(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures and latents in the shape that the VAE takes."""
        return x

    def _still(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `_framed`."""
        return x

    def _open_text_pipeline(self) -> Any:
        raise NotImplementedError

    def _vae_class(self) -> type:
        raise NotImplementedError

    def _open_vae(self) -> Any:
        if self._vae is None:
            vae: AnyModule = read_part(
                self._vae_class(), self.folder / "vae", torch_dtype=self.dtype
            )
            vae.enable_slicing()  # one picture at a time: memory does not grow with the batch
            self._vae = vae.to(self.device)
        return self._vae


def _check_layout(folder: Path, text_parts: tuple[str, ...]) -> None:
    """Raises ValueError for another class of scheduler, and for a missing part."""
    for part in ("vae/config.json", *text_parts, SCHEDULER_FILE):
        if not (folder / part).exists():
            raise ValueError(f"{folder} has no {part}; download the whole pipeline folder again")
    name = read_checked_object(folder / SCHEDULER_FILE, Scheduler).get("_class_name")
    if name not in SCHEDULERS:
        raise ValueError(
            f"{folder / SCHEDULER_FILE} names {name}; known schedulers: {', '.join(SCHEDULERS)}"
        )


def padded(rows: list[torch.Tensor]) -> Inputs:
    """[tokens, width] each -> embeddings and their mask."""
    embeddings = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(embeddings.shape[1]) < lengths[:, None]
    return {"encoder_hidden_states": embeddings, "encoder_hidden_states_mask": mask}


def read_part(loader: type, folder: Path, **options) -> nn.Module:
    """A model of diffusers or transformers from its folder, for evaluation; only safetensors are
    read."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors file; pickled weights are not read")
    for file in files:
        TensorFile(file)  # raises ValueError when the file is truncated
    try:
        model = loader.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, **options
        )
    except OSError as error:  # a shard of the index is missing
        raise ValueError(
            f"{folder} cannot be read ({_one_line(error)}); download it again"
        ) from error
    return model.eval().requires_grad_(False)


def read_tokenizer(kind: type, folder: Path):
    """Raises ValueError for a folder without a vocabulary; transformers would read an empty one
    without complaint."""
    if not any(all((folder / name).exists() for name in names) for names in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} has neither tokenizer.json nor vocab.json with merges.txt; download it again"
        )
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a bad vocabulary
        raise ValueError(
            f"{folder} cannot be read ({_one_line(error)}); download it again"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
