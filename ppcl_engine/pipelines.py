"""The text encoder, VAE and schedule of a diffusers pipeline folder; models are loaded when needed and released.

Prompts go through the pipeline's own `encode_prompt`, timesteps through its own scheduler; nothing of
them is written again here. The transformer is never loaded: checkpoint.py reads it.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import nn

from .architectures import Inputs
from .files import TensorFile, read_json
from .flow import euler_timesteps

PIPELINES = ("QwenImagePipeline",)
SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)
SCHEDULER_FILE = "scheduler/scheduler_config.json"
LATENT_SIDE = 128  # QwenImagePipeline.default_sample_size
TEXT_TOKENS = 512  # the limit of QwenImagePipeline's call; longer prompts are cut there too
TEXTS_AT_ONCE = 8  # the text encoder also computes 152,000 logits for every token
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""a tokenizer folder holds one of these; transformers reads an empty folder without complaint"""


class PipelineCodec:
    """A `Codec` (codecs.py) over the folder that `QwenImagePipeline.from_pretrained` reads.

    Computes in bf16 on a CUDA device and in fp32 elsewhere; takes and gives fp32 on the CPU. Raises
    ValueError for a folder of another pipeline, with a part missing, or with an unreadable part.
    """

    rescales_guidance = True  # QwenImagePipeline's call does

    def __init__(self, folder: Path, device: str = "cpu"):
        self.folder, self.device = Path(folder), device
        self.dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
        _check_layout(self.folder)
        config = read_json(self.folder / "vae" / "config.json")
        self.latent_channels: int = config["z_dim"]
        self.pixels_per_latent: int = 2 ** len(config["temperal_downsample"])
        self.picture_size = (LATENT_SIDE * self.pixels_per_latent,) * 2
        self._text_pipeline = None
        self._vae = None

    def timesteps(self, steps: int, image_tokens: int) -> list[float]:
        """The pipeline's own, shifted for the picture's size. Raises ValueError for fewer steps than the shift needs."""
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(read_json(self.folder / SCHEDULER_FILE))
        config = scheduler.config
        if config.shift_terminal and steps < 2:  # it stretches the line from the first timestep to the last
            raise ValueError(f"{self.folder / SCHEDULER_FILE} has a shift_terminal, which needs 2 steps; raise --steps")
        lengths = config.base_image_seq_len, config.max_image_seq_len
        shift = calculate_shift(image_tokens, *lengths, config.base_shift, config.max_shift)
        retrieve_timesteps(scheduler, sigmas=euler_timesteps(steps)[:-1], mu=shift)
        return scheduler.sigmas.tolist()

    def text(self, texts: list[str]) -> Inputs:
        """Embeddings [n, tokens, width] and mask [n, tokens] (True = real), zeros after the real tokens.

        The pipeline gives None for a mask that hides nothing; here it is all True.
        """
        pipeline = self._open_text_pipeline()
        rows: list[torch.Tensor] = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            chunk = texts[first : first + TEXTS_AT_ONCE]
            with torch.no_grad():
                embeddings, mask = pipeline.encode_prompt(chunk, self.device, max_sequence_length=TEXT_TOKENS)
            lengths = [embeddings.shape[1]] * len(chunk) if mask is None else mask.sum(1).tolist()
            rows += [row[:length].float().cpu() for row, length in zip(embeddings, lengths, strict=True)]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        return {"encoder_hidden_states": padded, "encoder_hidden_states_mask": mask}

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] -> [n, channels, H/8, W/8], about unit variance: the mode of the VAE's posterior"""
        vae = self._open_vae()
        frames = (2 * pictures - 1).unsqueeze(2).to(self.device, self.dtype)
        with torch.no_grad():
            mode = vae.encode(frames).latent_dist.mode().float().cpu()
        mean, deviation = _statistics(vae, mode)
        return ((mode - mean) / deviation).squeeze(2)

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """[n, channels, h, w] -> [n, 3, 8h, 8w], clipped to [0, 1]; as the pipeline's call decodes"""
        vae = self._open_vae()
        latents = latents.unsqueeze(2).to(self.device, self.dtype)
        mean, deviation = _statistics(vae, latents)
        with torch.no_grad():
            frames = vae.decode(latents / (1 / deviation) + mean).sample
        return (frames[:, :, 0].float().cpu() / 2 + 0.5).clamp(0, 1)

    def release(self) -> None:
        """Frees the text encoder and the VAE; the next call that needs one loads it again."""
        self._text_pipeline = self._vae = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _open_text_pipeline(self):
        if self._text_pipeline is None:
            from diffusers import QwenImagePipeline
            from transformers import Qwen2_5_VLForConditionalGeneration

            tokenizer = _read_tokenizer(self.folder / "tokenizer")
            encoder = _read_part(Qwen2_5_VLForConditionalGeneration, self.folder / "text_encoder", dtype=self.dtype)
            self._text_pipeline = QwenImagePipeline(
                scheduler=None, vae=None, text_encoder=encoder.to(self.device), tokenizer=tokenizer, transformer=None
            )
        return self._text_pipeline

    def _open_vae(self):
        if self._vae is None:
            from diffusers import AutoencoderKLQwenImage

            vae = _read_part(AutoencoderKLQwenImage, self.folder / "vae", torch_dtype=self.dtype)
            vae.enable_slicing()  # one picture at a time: memory does not grow with the batch
            self._vae = vae.to(self.device)
        return self._vae


def _check_layout(folder: Path) -> None:
    """Raises ValueError for another class of pipeline or scheduler, and for a part that is not there."""
    name = read_json(folder / "model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{folder}/model_index.json is of a {name}; known pipelines: {', '.join(PIPELINES)}")
    for part in ("vae/config.json", "text_encoder/config.json", "tokenizer", SCHEDULER_FILE):
        if not (folder / part).exists():
            raise ValueError(f"{folder} has no {part}; download the whole pipeline folder again")
    name = read_json(folder / SCHEDULER_FILE).get("_class_name")
    if name not in SCHEDULERS:
        raise ValueError(f"{folder / SCHEDULER_FILE} is of a {name}; known schedulers: {', '.join(SCHEDULERS)}")


def _read_part(loader: type, folder: Path, **options) -> nn.Module:
    """A model of diffusers or transformers from its folder, for evaluation, from safetensors alone."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors file; pickled weights are not read")
    for file in files:
        TensorFile(file)  # raises ValueError when the file is truncated
    try:
        model = loader.from_pretrained(folder, use_safetensors=True, local_files_only=True, **options)
    except OSError as error:  # a shard of the index is missing
        raise ValueError(f"{folder} cannot be read ({_one_line(error)}); download it again") from error
    return model.eval().requires_grad_(False)


def _read_tokenizer(folder: Path):
    from transformers import Qwen2Tokenizer

    if not any(all((folder / name).exists() for name in names) for names in TOKENIZER_FILES):
        raise ValueError(f"{folder} has neither tokenizer.json nor vocab.json with merges.txt; download it again")
    try:
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a bad vocabulary
        raise ValueError(f"{folder} cannot be read ({_one_line(error)}); download it again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _statistics(vae: nn.Module, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents' mean and standard deviation [1, channels, 1, 1, 1], of the device and dtype of `like`."""
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std])
    mean, deviation = values.to(like.device, like.dtype)[:, None, :, None, None, None]
    return mean, deviation
