"""Generate: draw captions with any model file, and put the pictures side by side in one PNG."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from ...algorithms.sparsity.kernels import on_kernels
from ...architectures import Architecture
from ...data.codecs import open_codec
from ...data.codecs.base import Codec
from ...data.draw import Prompts, draw_prompts, encode_edits, encode_prompts
from ...models.opening import architecture_of, open_model
from ...settings.assess_settings import GenerateConfig
from ...system.atomic import replacing
from ...system.machine import resolve_device

BATCH = 16


def generate(config: GenerateConfig) -> Path:
    """The text encoder, the transformer and the VAE are in memory one after the other."""
    device = resolve_device(config.device)
    codec = open_codec(config.base or config.path, device)
    texts = [text.strip() for text in config.prompt.split("|")]
    architecture = architecture_of(config.path)
    prompts = _encoded(config, architecture, codec, texts)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = open_model(config.path, config.variant, config.base, dtype, device)
    on_kernels(model)
    latents = draw_prompts(
        architecture, model, prompts, config.seed, config.steps, config.guidance, BATCH, "generate"
    )
    del model
    gc.collect()
    save_row(config.output, codec.pictures(latents))
    return config.output


def _encoded(
    config: GenerateConfig, architecture: Architecture, codec: Codec, texts: list[str]
) -> Prompts:
    """Raises ValueError for a reference that is no file."""
    references = [Path(path.strip()) for path in config.references.split("|") if path.strip()]
    if not references:
        return encode_prompts(codec, texts, config.height, config.width)
    absent = [path for path in references if not path.is_file()]
    if absent:
        raise ValueError(
            f"{absent[0]} does not exist; name the pictures to change with --references"
        )
    return encode_edits(
        architecture, codec, texts, [references] * len(texts), config.height, config.width
    )


def save_row(path: Path, pictures: torch.Tensor) -> None:
    """Pictures [n, 3, H, W] in [0, 1] beside each other; small ones enlarged without smoothing."""
    from PIL import Image

    row = (pictures * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2).numpy()
    image = Image.fromarray(row)
    scale = max(1, 256 // pictures.shape[-2])
    with replacing(path) as temporary:
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(
            temporary, format="PNG"
        )
