"""What holds of every pipeline folder with pooled text: a missing part is named, drawings are
diffusers' own, and stored embeddings calibrate as prompts do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppcl_engine.__main__ import main
from ppcl_engine.architectures import Architecture
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.codecs.base import Codec
from ppcl_engine.data.sampling import draw_prompts, encode_prompts, seeded_noise
from ppcl_engine.models.opening import open_model
from ppcl_engine.system.tensor_files import write_tensors

CAPTIONS = ["a red cat", "", "the image of the sea, by xyz " + 100 * "red "]


def check_latents(codec: Codec, pipeline, shift: float, scale: float) -> None:
    """The posterior's mode, shifted and scaled; pictures undo it."""
    pictures = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mode = pipeline.vae.encode(2 * pictures - 1).latent_dist.mode()
        decoded = (pipeline.vae.decode(mode).sample / 2 + 0.5).clamp(0, 1)
    latents = codec.latents(pictures)
    assert latents.shape == (2, codec.latent_channels, 8, 12)
    torch.testing.assert_close(latents, (mode - shift) * scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codec.pictures(latents), decoded, rtol=0, atol=1e-4)


def check_drawing(
    architecture: Architecture,
    folder: Path,
    pipeline,
    codec: Codec,
    steps: int,
    guidance: float,
    theirs: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Latents and pictures of the pipeline's call from the same noise. theirs: latents as the
    pipeline takes them."""
    prompts = encode_prompts(codec, CAPTIONS, height=32, width=48)
    latents = draw_prompts(architecture, open_model(folder), prompts, 7, steps, guidance, 2, "draw")
    noise = torch.stack([seeded_noise(7, i, prompts.latent_shape) for i in range(len(CAPTIONS))])
    call = {"prompt": CAPTIONS, "guidance_scale": guidance, "height": 32, "width": 48}
    call |= {"num_inference_steps": steps, "latents": theirs(noise)}
    expected = pipeline(**call, output_type="latent").images
    assert (latents - noise).abs().max() > 0.1
    torch.testing.assert_close(theirs(latents), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        codec.pictures(latents), pipeline(**call, output_type="pt").images, rtol=0, atol=1e-4
    )


def check_missing_part(folder: Path, copy: Path, part: str) -> None:
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    with pytest.raises(
        ValueError, match=f"{copy.name} has no {part}; download the whole pipeline folder again"
    ):
        open_codec(copy)


def calibrated_both_ways(folder: Path, codec: Codec, work: Path) -> list[list[dict]]:
    """Batches of the first caption as a prompt, and of its stored embedding; half of them of the
    empty caption."""
    (work / "prompts.txt").write_text("\n".join(CAPTIONS[:1]) + "\n")
    text, nothing = codec.text(CAPTIONS[:1]), codec.text([""])
    write_tensors(
        work / "e.safetensors",
        {
            "text": text["encoder_hidden_states"],
            "pooled": text["pooled_projections"],
            "empty": nothing["encoder_hidden_states"],
            "empty_pooled": nothing["pooled_projections"],
        },
    )
    common = ["--model", folder, "--device", "cpu", "--samples", 4, "--batch", 2, "--steps", 2]
    common += ["--height", 32, "--width", 32, "--guidance", 3.5, "--empty-captions", 0.5]
    batches = []
    for name, source in (
        ("a", ["--prompts", work / "prompts.txt"]),
        ("b", ["--embeddings", work / "e.safetensors"]),
    ):
        arguments = ["calibrate", *common, *source, "--run", work / name]
        assert main([str(argument) for argument in arguments]) == 0
        batches.append(load_calibration(work / name / "calibration.safetensors").batches)
    return batches
