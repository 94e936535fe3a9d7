"""A Krea 2 pipeline folder's text encoder, VAE and schedule give what diffusers' own pipeline gives,
and its stages run."""

import json
import shutil

import pytest
import torch

from ppcl_engine.__main__ import main
from ppcl_engine.architectures import architecture_named
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.sampling import draw_prompts, encode_prompts, seeded_noise
from ppcl_engine.models.opening import open_model

from ...tiny.krea2_folder import LATENT_CHANNELS, LAYERS, TEXT_WIDTH, build_tiny_krea2_pipeline
from ...tiny.pooled_checks import CAPTIONS, check_missing_part

KREA = architecture_named("krea2")
SIZE = {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_krea2_pipeline(tmp_path_factory.mktemp("krea2") / "pipeline")


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import Krea2Pipeline

    pipeline = Krea2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def codec(folder):
    return open_codec(folder)


def test_codec_knows_its_sizes_without_loading_a_model(codec, pipeline):
    assert codec.pixels_per_latent == pipeline.vae_scale_factor
    assert codec.latent_channels == LATENT_CHANNELS and not codec.rescales_guidance
    assert codec._text_pipeline is None and codec._vae is None


def test_text_is_what_the_pipeline_encodes(codec, pipeline):
    """Its padding, which stands in the middle, is left out."""
    with torch.no_grad():
        expected, real = pipeline.encode_prompt(list(CAPTIONS))
    text = codec.text(CAPTIONS)
    assert list(text) == list(KREA.caption_inputs)
    embeddings, mask = text.values()
    assert embeddings.shape[2] == len(LAYERS) * TEXT_WIDTH
    assert mask.sum(1).tolist() == real.sum(1).tolist() and mask.shape[1] < real.shape[1]
    for row, own, layers, theirs in zip(embeddings, mask, expected, real, strict=True):
        torch.testing.assert_close(row[own], layers[theirs].flatten(1), rtol=1e-4, atol=1e-5)
        assert not row[~own].any()


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["distilled", "guided"])
def test_drawing_is_the_pipelines(folder, codec, pipeline, guidance):
    """Its guidance_scale counts from 0."""
    prompts = encode_prompts(codec, CAPTIONS[:2], **SIZE)
    latents = draw_prompts(KREA, open_model(folder), prompts, 7, 3, guidance, 2, "draw")
    noise = KREA.pack(torch.stack([seeded_noise(7, i, prompts.latent_shape) for i in range(2)]))
    call = {"num_inference_steps": 3, "latents": noise, "output_type": "latent", **SIZE}
    expected = pipeline(prompt=list(CAPTIONS[:2]), guidance_scale=guidance - 1, **call).images
    assert (KREA.pack(latents) - noise).abs().max() > 0.1
    torch.testing.assert_close(KREA.pack(latents), expected, rtol=0, atol=1e-4)


def test_the_distilled_model_has_one_shift_for_all_sizes(folder, codec, tmp_path):
    shutil.copytree(folder, tmp_path / "few", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "few" / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "is_distilled": True}))
    few = open_codec(tmp_path / "few")
    assert few.timesteps(8, 24) == few.timesteps(8, 240)
    assert codec.timesteps(8, 24) != codec.timesteps(8, 240)


def test_calibration_records_the_schedule(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:1]) + "\n")
    arguments = ["calibrate", "--model", folder, "--device", "cpu", "--samples", 4, "--batch", 2]
    arguments += ["--steps", 2, "--height", 32, "--width", 32, "--guidance", 1]
    arguments += ["--prompts", tmp_path / "prompts.txt", "--run", tmp_path / "run"]
    assert main([str(argument) for argument in arguments]) == 0
    batches = load_calibration(tmp_path / "run" / "calibration.safetensors").batches
    assert batches[0]["hidden_states"].shape[::2] == (2, 4 * LATENT_CHANNELS)
    assert set(KREA.caption_inputs) <= batches[0].keys()


def test_a_missing_part_is_named(folder, tmp_path):
    check_missing_part(folder, tmp_path / "copy", "tokenizer")
