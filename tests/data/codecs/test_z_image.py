"""A Z-Image pipeline folder's text encoder, VAE and schedule give what diffusers' own pipeline
gives, and its stages run."""

import pytest
import torch

from ppcl_engine.__main__ import main
from ppcl_engine.architectures import architecture_named
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.sampling import draw_prompts, encode_prompts, seeded_noise
from ppcl_engine.models.opening import open_model

from ...tiny.flux1_folder import LATENT_CHANNELS, VAE_CONFIG
from ...tiny.pooled_checks import CAPTIONS, check_latents, check_missing_part
from ...tiny.z_image_folder import TEXT_WIDTH, build_tiny_z_image_pipeline

Z_IMAGE = architecture_named("z_image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_z_image_pipeline(tmp_path_factory.mktemp("z_image") / "pipeline")


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def codec(folder):
    return open_codec(folder)


def test_codec_knows_its_sizes_without_loading_a_model(codec, pipeline):
    assert codec.pixels_per_latent == pipeline.vae_scale_factor == 4
    assert codec.latent_channels == LATENT_CHANNELS and not codec.rescales_guidance
    assert codec._text_pipeline is None and codec._vae is None


def test_text_is_what_the_pipeline_encodes(codec, pipeline):
    captions = CAPTIONS * 4  # more than are encoded at once
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
    text = codec.text(captions)
    assert list(text) == list(Z_IMAGE.caption_inputs)
    embeddings, mask = text.values()
    assert embeddings.shape[2] == TEXT_WIDTH and captions == CAPTIONS * 4
    for row, real, theirs in zip(embeddings, mask, expected, strict=True):
        torch.testing.assert_close(row[real], theirs, rtol=1e-4, atol=1e-5)
        assert not row[~real].any()


def test_latents_and_pictures(codec, pipeline):
    check_latents(codec, pipeline, VAE_CONFIG["shift_factor"], VAE_CONFIG["scaling_factor"])


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["turbo", "guided"])
def test_drawing_is_the_pipelines(folder, codec, pipeline, guidance):
    """Its guidance_scale counts from 0; without guidance it draws as Turbo is drawn."""
    prompts = encode_prompts(codec, CAPTIONS, height=32, width=48)
    model = open_model(folder)
    latents = draw_prompts(Z_IMAGE, model, prompts, 7, 3, guidance, 2, "draw")
    noise = torch.stack([seeded_noise(7, i, prompts.latent_shape) for i in range(len(CAPTIONS))])
    call = {"height": 32, "width": 48, "num_inference_steps": 3, "latents": noise}
    expected = pipeline(
        prompt=list(CAPTIONS), guidance_scale=guidance - 1, output_type="latent", **call
    ).images
    assert (latents - noise).abs().max() > 0.1
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)


def test_calibration_records_the_schedule(folder, codec, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:1]) + "\n")
    arguments = ["calibrate", "--model", folder, "--device", "cpu", "--samples", 4, "--batch", 2]
    arguments += ["--steps", 2, "--height", 32, "--width", 32, "--guidance", 1]
    arguments += ["--prompts", tmp_path / "prompts.txt", "--run", tmp_path / "run"]
    assert main([str(argument) for argument in arguments]) == 0
    batches = load_calibration(tmp_path / "run" / "calibration.safetensors").batches
    assert batches[0]["hidden_states"].shape == (2, 16, 4 * LATENT_CHANNELS)
    assert set(Z_IMAGE.caption_inputs) <= batches[0].keys()


def test_a_missing_part_is_named(folder, tmp_path):
    check_missing_part(folder, tmp_path / "copy", "tokenizer")
