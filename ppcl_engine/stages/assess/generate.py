"""Generate: draw captions with any model file, and put the pictures side by side in one file."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from ...algorithms.sparsity.kernels import on_kernels
from ...architectures import Architecture
from ...data.codecs import open_codec
from ...data.codecs.base import Codec
from ...data.sampling import Prompts, draw_prompts, encode_edits, encode_prompts
from ...models.bundle import Bundle
from ...models.kinds import open_file
from ...models.opening import open_model
from ...models.released import Released
from ...settings.assess_settings import GenerateConfig
from ...system.atomic import replacing
from ...system.finite import BAD_PICTURE, check_finite
from ...system.machine import resolve_device
from ...system.outputs import LONGEST_JPEG, check_picture
from ...system.tensor_files import check_exists

BATCH = 16


def generate(config: GenerateConfig) -> Path:
    """Returns the picture. The text encoder, the transformer and the VAE are in memory one after the
    other."""
    form = check_picture(config.output)
    device = resolve_device(config.device)
    _check_kinds(config)
    codec = open_codec(config.base or config.path, device)
    texts = [text.strip() for text in config.prompt.split("|")]
    architecture = open_file(config.path).architecture
    prompts = _encoded(config, architecture, codec, texts)
    _check_fits(config.output, form, prompts, codec)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = open_model(config.path, config.variant, config.base, dtype, device)
    on_kernels(model)
    latents = draw_prompts(
        architecture, model, prompts, config.seed, config.steps, config.guidance, BATCH, "generate"
    )
    del model
    gc.collect()
    pictures = codec.pictures(latents)
    check_finite({"picture": pictures}, config.base or config.path, BAD_PICTURE)
    save_row(config.output, pictures, form)
    return config.output


def _check_kinds(config: GenerateConfig) -> None:
    """Raises ValueError for a bundle without its base, and for a base that has no text encoder
    because it is a pruned model."""
    for path in (config.path, config.base):
        if path is not None:
            check_exists(path)
    if config.base is None:
        if isinstance(open_file(config.path), Bundle):
            raise ValueError(
                f"{config.path} is a bundle: students only; give the full model it was made from as --base"
            )
    elif isinstance(base := open_file(config.base), Bundle | Released):
        raise ValueError(
            f"--base {config.base} is a {base.kind}, not a full model; give the one that {config.path} was made from"
        )


def _encoded(
    config: GenerateConfig, architecture: Architecture, codec: Codec, texts: list[str]
) -> Prompts:
    """Raises ValueError for a reference that does not exist, or that the result would replace."""
    references = [Path(path.strip()) for path in config.references.split("|") if path.strip()]
    if not references:
        return encode_prompts(codec, texts, config.height, config.width)
    absent = [path for path in references if not path.is_file()]
    if absent:
        raise ValueError(
            f"{absent[0]} does not exist; name the pictures to change with --references"
        )
    if any(path.samefile(config.output) for path in references if config.output.exists()):
        raise ValueError(
            f"{config.output} is one of the references; name another file with --output"
        )
    return encode_edits(
        architecture, codec, texts, [references] * len(texts), config.height, config.width
    )


def _check_fits(path: Path, form: str, prompts: Prompts, codec: Codec) -> None:
    """Raises ValueError, before anything is drawn, if the row is too wide for its format."""
    width = prompts.count * prompts.latent_shape[2] * codec.pixels_per_latent
    if form == "JPEG" and width > LONGEST_JPEG:
        raise ValueError(
            f"{path}: {width:,} pixels beside each other are too many for a JPEG; write a .png"
        )


def save_row(path: Path, pictures: torch.Tensor, form: str = "PNG") -> None:
    """Writes pictures [n, 3, H, W] in [0, 1] side by side; small ones are enlarged without smoothing."""
    from PIL import Image

    row = (pictures * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2).numpy()
    image = Image.fromarray(row)
    scale = max(1, min(256 // pictures.shape[-2], LONGEST_JPEG // image.width))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    with replacing(path) as temporary:
        image.save(
            temporary, format=form, **({"quality": 95, "subsampling": 0} if form == "JPEG" else {})
        )
