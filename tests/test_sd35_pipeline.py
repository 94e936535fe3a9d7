"""An SD3.5 pipeline folder's text encoders, VAE and schedule give what diffusers' own pipeline gives."""

import shutil

import pytest
import torch

from ppcl_engine.__main__ import main
from ppcl_engine.architectures import architecture_named
from ppcl_engine.bundle import open_model
from ppcl_engine.codecs import open_codec
from ppcl_engine.data import load_calibration
from ppcl_engine.files import write_tensors
from ppcl_engine.sampling import draw_prompts, encode_prompts, seeded_noise

from .tiny_sd35_pipeline import CLIP_WIDTHS, LATENT_CHANNELS, SCALE, SHIFT, TEXT_WIDTH, build_tiny_sd35_pipeline

CAPTIONS = ["a red cat", "", "the image of the sea, by xyz " + 100 * "red "]
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
    assert codec.pixels_per_latent == pipeline.vae_scale_factor == 4 and codec.latent_channels == LATENT_CHANNELS
    assert codec.picture_size == (4 * pipeline.default_sample_size,) * 2 and not codec.rescales_guidance
    assert codec._text_pipeline is None and codec._vae is None


def test_text_is_what_the_pipeline_encodes(codec, pipeline):
    """77 tokens of the CLIPs, 256 of T5, as in the pipeline's call."""
    captions = CAPTIONS * 4  # more than are encoded at once
    with torch.no_grad():
        expected, _, pooled, _ = pipeline.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
    text = codec.text(captions)
    assert list(text) == list(SD35.caption_inputs)
    assert text["encoder_hidden_states"].shape == (12, 77 + 256, TEXT_WIDTH)
    assert text["pooled_projections"].shape == (12, sum(CLIP_WIDTHS))
    torch.testing.assert_close(text["encoder_hidden_states"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(text["pooled_projections"], pooled, rtol=0, atol=1e-5)
    assert pooled[:3].std(0).min() > 1e-3 and not torch.equal(expected[0], expected[2])


def test_latents_are_shifted_and_scaled_and_pictures_undo_it(codec, pipeline):
    pictures = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mode = pipeline.vae.encode(2 * pictures - 1).latent_dist.mode()
    latents = codec.latents(pictures)
    assert latents.shape == (2, LATENT_CHANNELS, 8, 12)
    torch.testing.assert_close(latents, (mode - SHIFT) * SCALE, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        decoded = (pipeline.vae.decode(mode).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(codec.pictures(latents), decoded, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps, guidance", [(1, 2.0), (3, 3.5), (4, 1.0)])
def test_a_drawing_is_the_pipelines_own(folder, pipeline, codec, steps, guidance):
    """The scheduler's own shifted steps, guidance by an empty caption: latents and pictures from the same noise."""
    prompts = encode_prompts(codec, CAPTIONS, height=32, width=48)
    latents = draw_prompts(SD35, open_model(folder), prompts, 7, steps, guidance, 2, "draw")
    noise = torch.stack([seeded_noise(7, i, prompts.latent_shape) for i in range(len(CAPTIONS))])
    call = {"prompt": CAPTIONS, "guidance_scale": guidance, "height": 32, "width": 48}
    call |= {"num_inference_steps": steps, "latents": noise}
    expected = pipeline(**call, output_type="latent").images
    assert (latents - noise).abs().max() > 0.1
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(codec.pictures(latents), pipeline(**call, output_type="pt").images, rtol=0, atol=1e-4)


def test_timesteps_are_the_schedulers(codec, pipeline):
    """Shifted by 3 whatever the size; the last step goes from the smallest timestep to 0."""
    pipeline.scheduler.set_timesteps(28)
    times = codec.timesteps(28, 256)
    assert times == pipeline.scheduler.sigmas.tolist() == codec.timesteps(28, 4096)
    assert times[0] == 1 and times[-1] == 0 and times == sorted(times, reverse=True) and times[14] > 0.7


@pytest.mark.parametrize("part", ["text_encoder_2/config.json", "tokenizer_2", "text_encoder_3/config.json"])
def test_a_folder_without_a_part_is_refused(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    with pytest.raises(ValueError, match=f"copy has no {part}; download the whole pipeline folder again"):
        open_codec(copy)


def test_prompts_and_stored_embeddings_calibrate_alike(folder, codec, tmp_path):
    """Equal steps there, the model's own schedule here, and the same text in both."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS[:1]) + "\n")
    text, nothing = codec.text(CAPTIONS[:1]), codec.text([""])
    write_tensors(tmp_path / "e.safetensors", {
        "text": text["encoder_hidden_states"], "pooled": text["pooled_projections"],
        "empty": nothing["encoder_hidden_states"], "empty_pooled": nothing["pooled_projections"]})  # fmt: skip
    batches = []
    for name, options in (("a", ["--prompts", prompts]), ("b", ["--embeddings", tmp_path / "e.safetensors"])):
        options += ["--model", folder, "--run", tmp_path / name, "--device", "cpu", "--samples", 4, "--batch", 2]
        options += ["--height", 32, "--width", 32, "--steps", 2, "--guidance", 3.5, "--empty-captions", 0.5]
        assert main(["calibrate", *map(str, options)]) == 0
        batches.append(load_calibration(tmp_path / name / "calibration.safetensors").batches)
    for ours, theirs in zip(*batches, strict=True):
        for name in SD35.caption_inputs:  # four captions at once there, one here
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
        assert "guidance" not in ours
