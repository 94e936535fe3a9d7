"""An SD3.5 pipeline folder's text encoders, VAE and schedule give what diffusers' own pipeline
gives."""

import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.data.codecs import open_codec

from ...tiny.flux1_folder import TEXT_WIDTH
from ...tiny.pooled_checks import (
    CAPTIONS,
    calibrated_both_ways,
    check_drawing,
    check_latents,
    check_missing_part,
)
from ...tiny.sd35_folder import CLIP_WIDTHS, LATENT_CHANNELS, SCALE, SHIFT, build_tiny_sd35_pipeline

SD35 = architecture_named("sd35")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_sd35_pipeline(tmp_path_factory.mktemp("sd35") / "pipeline")


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(folder)


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
    """77 tokens of the CLIPs, 256 of T5, as in the pipeline's call."""
    captions = CAPTIONS * 4  # more than are encoded at once
    with torch.no_grad():
        expected, _, pooled, _ = pipeline.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False
        )
    text = codec.text(captions)
    assert list(text) == list(SD35.caption_inputs)
    assert text["encoder_hidden_states"].shape == (12, 77 + 256, TEXT_WIDTH)
    assert text["pooled_projections"].shape == (12, sum(CLIP_WIDTHS))
    torch.testing.assert_close(text["encoder_hidden_states"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(text["pooled_projections"], pooled, rtol=0, atol=1e-5)
    assert pooled[:3].std(0).min() > 1e-3 and not torch.equal(expected[0], expected[2])


def test_latents_are_shifted_and_scaled_and_pictures_undo_it(codec, pipeline):
    check_latents(codec, pipeline, shift=SHIFT, scale=SCALE)


@pytest.mark.parametrize("steps, guidance", [(1, 2.0), (3, 3.5), (4, 1.0)])
def test_a_drawing_is_the_pipelines_own(folder, pipeline, codec, steps, guidance):
    """The scheduler's own shifted steps, guidance by an empty caption: latents and pictures from
    the same noise."""
    check_drawing(SD35, folder, pipeline, codec, steps, guidance, lambda latents: latents)


def test_timesteps_are_the_schedulers(codec, pipeline):
    """Shifted by 3 whatever the size; the last step goes from the smallest timestep to 0."""
    pipeline.scheduler.set_timesteps(28)
    times = codec.timesteps(28, 256)
    assert times == pipeline.scheduler.sigmas.tolist() == codec.timesteps(28, 4096)
    assert (
        times[0] == 1
        and times[-1] == 0
        and times == sorted(times, reverse=True)
        and times[14] > 0.7
    )


@pytest.mark.parametrize(
    "part", ["text_encoder_2/config.json", "tokenizer_2", "text_encoder_3/config.json"]
)
def test_a_folder_without_a_part_is_refused(folder, tmp_path, part):
    check_missing_part(folder, tmp_path / "copy", part)


def test_prompts_and_stored_embeddings_calibrate_alike(folder, codec, tmp_path):
    """Equal steps there, the model's own schedule here, and the same text in both."""
    batches = calibrated_both_ways(folder, codec, tmp_path)
    for ours, theirs in zip(*batches, strict=True):
        for name in SD35.caption_inputs:  # four captions at once there, one here
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
        assert "guidance" not in ours
