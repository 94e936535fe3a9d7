"""A FLUX pipeline folder's text encoders, VAE and schedule give what diffusers' own pipeline gives."""

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

from .tiny_flux_pipeline import LATENT_CHANNELS, POOLED_WIDTH, TEXT_WIDTH, build_tiny_flux_pipeline

CAPTIONS = ["a red cat", "", "the image of the sea, by xyz " + 100 * "red "]
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
    assert codec.pixels_per_latent == pipeline.vae_scale_factor == 4 and codec.latent_channels == LATENT_CHANNELS
    assert codec.picture_size == (4 * pipeline.default_sample_size,) * 2 and not codec.rescales_guidance
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
    pictures = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mode = pipeline.vae.encode(2 * pictures - 1).latent_dist.mode()
    latents = codec.latents(pictures)
    assert latents.shape == (2, LATENT_CHANNELS, 8, 12)
    torch.testing.assert_close(latents, (mode - 0.1159) * 0.3611, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        decoded = (pipeline.vae.decode(mode).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(codec.pictures(latents), decoded, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps, guidance", [(2, 3.5), (4, 1.0)])
def test_a_drawing_is_the_pipelines_own(folder, pipeline, codec, steps, guidance):
    """Shifted timesteps, guidance as an input: latents and pictures of the pipeline's call from the same noise."""
    prompts = encode_prompts(codec, CAPTIONS, height=32, width=48)
    latents = draw_prompts(FLUX, open_model(folder), prompts, 7, steps, guidance, 2, "draw")
    noise = torch.stack([seeded_noise(7, i, prompts.latent_shape) for i in range(len(CAPTIONS))])
    call = {"prompt": CAPTIONS, "guidance_scale": guidance, "height": 32, "width": 48}
    call |= {"num_inference_steps": steps, "latents": FLUX.pack(noise)}
    expected = pipeline(**call, output_type="latent").images
    assert (latents - noise).abs().max() > 0.1
    torch.testing.assert_close(FLUX.pack(latents), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(codec.pictures(latents), pipeline(**call, output_type="pt").images, rtol=0, atol=1e-4)


def test_timesteps_are_shifted_for_the_pictures_size(codec):
    small, large = codec.timesteps(4, 256), codec.timesteps(4, 4096)
    assert small[0] == large[0] == 1 and small[-1] == large[-1] == 0
    assert all(a < b for a, b in zip(small[1:-1], large[1:-1], strict=True))


@pytest.mark.parametrize("part", ["text_encoder_2/config.json", "tokenizer_2", "tokenizer"])
def test_a_folder_without_a_part_is_refused(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    with pytest.raises(ValueError, match=f"copy has no {part}; download the whole pipeline folder again"):
        open_codec(copy)


def test_prompts_and_stored_embeddings_calibrate_alike(folder, codec, tmp_path):
    """Equal steps there, the model's own schedule here, and the same text and guidance in both."""
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
        for name in (*FLUX.caption_inputs, "guidance"):
            assert torch.equal(ours[name], theirs[name])
    assert (batches[0][0]["guidance"] == 3.5).all()
