"""A FLUX pipeline folder's text encoders, VAE and schedule give what diffusers' own pipeline
gives."""

import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.data.codecs import open_codec

from ...tiny.flux1_folder import LATENT_CHANNELS, POOLED_WIDTH, TEXT_WIDTH, build_tiny_flux_pipeline
from ...tiny.pooled_checks import (
    CAPTIONS,
    calibrated_both_ways,
    check_drawing,
    check_latents,
    check_missing_part,
)

FLUX = architecture_named("flux1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_flux_pipeline(tmp_path_factory.mktemp("flux") / "pipeline")


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def codec(folder):
    return open_codec(folder)


def test_codec_knows_its_sizes_without_loading_a_model(codec, pipeline):
    assert (
        codec.pixels_per_latent == pipeline.vae_scale_factor == 4
        and codec.latent_channels == LATENT_CHANNELS
    )
    assert (
        codec.picture_size == (4 * pipeline.default_sample_size,) * 2
        and not codec.rescales_guidance
    )
    assert codec._text_pipeline is None and codec._vae is None


def test_text_is_what_the_pipeline_encodes(codec, pipeline):
    captions = CAPTIONS * 4  # more than are encoded at once
    with torch.no_grad():
        expected, pooled, _ = pipeline.encode_prompt(captions, max_sequence_length=512)
    text = codec.text(captions)
    assert list(text) == list(FLUX.caption_inputs)
    assert text["encoder_hidden_states"].shape == (12, 512, TEXT_WIDTH)
    assert text["pooled_projections"].shape == (12, POOLED_WIDTH)
    torch.testing.assert_close(text["encoder_hidden_states"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(text["pooled_projections"], pooled, rtol=0, atol=1e-5)
    assert pooled[:3].std(0).min() > 1e-3 and not torch.equal(expected[0], expected[2])


def test_latents_are_shifted_and_scaled_and_pictures_undo_it(codec, pipeline):
    check_latents(codec, pipeline, shift=0.1159, scale=0.3611)


@pytest.mark.parametrize("steps, guidance", [(2, 3.5), (4, 1.0)])
def test_a_drawing_is_the_pipelines_own(folder, pipeline, codec, steps, guidance):
    """Shifted timesteps, guidance as an input: latents and pictures of the pipeline's call from the
    same noise."""
    check_drawing(FLUX, folder, pipeline, codec, steps, guidance, FLUX.pack)


def test_timesteps_are_shifted_for_the_pictures_size(codec):
    small, large = codec.timesteps(4, 256), codec.timesteps(4, 4096)
    assert small[0] == large[0] == 1 and small[-1] == large[-1] == 0
    assert all(a < b for a, b in zip(small[1:-1], large[1:-1], strict=True))


@pytest.mark.parametrize("part", ["text_encoder_2/config.json", "tokenizer_2", "tokenizer"])
def test_a_folder_without_a_part_is_refused(folder, tmp_path, part):
    check_missing_part(folder, tmp_path / "copy", part)


def test_prompts_and_stored_embeddings_calibrate_alike(folder, codec, tmp_path):
    """Equal steps there, the model's own schedule here, and the same text and guidance in both."""
    batches = calibrated_both_ways(folder, codec, tmp_path)
    for ours, theirs in zip(*batches, strict=True):
        for name in (*FLUX.caption_inputs, "guidance"):
            assert torch.equal(ours[name], theirs[name])
    assert (batches[0][0]["guidance"] == 3.5).all()
