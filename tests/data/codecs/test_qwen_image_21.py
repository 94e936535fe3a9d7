"""A Qwen-Image 2.1 pipeline folder's text encoder, VAE and schedule give what diffusers' own
pipeline gives, and its stages run."""

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

from ...tiny.pooled_checks import CAPTIONS, check_missing_part
from ...tiny.qwen_image_21_folder import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    build_tiny_qwen_image_21_pipeline,
)

QWEN = architecture_named("qwen_image_21")
SIZE = {"height": 64, "width": 96}


class Processor:
    """The parts of transformers' own that text needs, as it has them: it itself needs torchvision.
    Its chat template is read from the folder."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **options):
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template([messages], **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_qwen_image_21_pipeline(tmp_path_factory.mktemp("qwen21") / "pipeline")


@pytest.fixture(scope="module")
def pipeline(folder):
    import diffusers
    import transformers

    index = json.loads((folder / "model_index.json").read_text())
    parts = {
        name: getattr(diffusers if library == "diffusers" else transformers, kind).from_pretrained(
            folder / name
        )
        for name, (library, kind) in (item for item in index.items() if item[0][0] != "_")
        if name != "processor"
    }
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder / "processor")
    made = diffusers.QwenImage21Pipeline(**parts, processor=Processor(tokenizer))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def codec(folder):
    return open_codec(folder)


def test_codec_knows_its_sizes_without_loading_a_model(codec, pipeline):
    assert codec.pixels_per_latent == pipeline.vae_scale_factor == 16
    assert codec.picture_size == (1024, 1024) and not codec.rescales_guidance
    assert codec.latent_channels == LATENT_CHANNELS
    assert codec._text_pipeline is None and codec._vae is None


def test_text_is_what_the_pipeline_encodes(codec, pipeline):
    captions = CAPTIONS * 4  # more than are encoded at once
    with torch.no_grad():
        expected, real, _ = pipeline.encode_prompt(list(captions), device="cpu")
    text = codec.text(captions)
    assert list(text) == list(QWEN.caption_inputs)
    embeddings, mask = text.values()
    assert embeddings.shape[2] == TEXT_WIDTH and torch.equal(mask, real.bool())
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)
    assert codec._text_pipeline._drop_idx == pipeline._drop_idx


def test_latents_and_pictures(codec, pipeline):
    """Opaque pictures in, over white out."""
    pictures = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    opaque = torch.cat([2 * pictures - 1, torch.ones(2, 1, 64, 32)], dim=1)[:, :, None]
    latents = codec.latents(pictures)
    assert latents.shape == (2, LATENT_CHANNELS, 4, 2)
    with torch.no_grad():
        expected = pipeline._encode_vae_image(opaque, None)
        mode = pipeline.vae.encode(opaque).latent_dist.mode()
        red, green, blue, alpha = (
            (pipeline.vae.decode(mode).sample[:, :, 0] / 2 + 0.5).clamp(0, 1).unbind(1)
        )
    torch.testing.assert_close(latents, expected[:, :, 0], rtol=1e-5, atol=1e-5)
    over_white = torch.stack([c * alpha + 1 - alpha for c in (red, green, blue)], dim=1)
    torch.testing.assert_close(codec.pictures(latents), over_white, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["as released", "guided"])
def test_drawing_is_the_pipelines(folder, codec, pipeline, guidance):
    """Each caption by itself: in a batch the pipeline moves the image behind the longest."""
    caption = CAPTIONS[2]
    prompts = encode_prompts(codec, [caption], **SIZE)
    latents = draw_prompts(QWEN, open_model(folder), prompts, 7, 3, guidance, 1, "draw")
    noise = QWEN.pack(seeded_noise(7, 0, prompts.latent_shape)[None])
    call = {"num_inference_steps": 3, "latents": noise, "negative_prompt": "", **SIZE}
    expected = pipeline(
        prompt=caption, true_cfg_scale=guidance, output_type="latent", use_kv_cache=False, **call
    ).images
    assert (QWEN.pack(latents) - noise).abs().max() > 0.1
    torch.testing.assert_close(QWEN.pack(latents), expected, rtol=0, atol=1e-4)


def test_calibration_records_the_schedule(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:1]) + "\n")
    arguments = ["calibrate", "--model", folder, "--device", "cpu", "--samples", 4, "--batch", 2]
    arguments += ["--steps", 2, "--height", 64, "--width", 64, "--guidance", 1]
    arguments += ["--prompts", tmp_path / "prompts.txt", "--run", tmp_path / "run"]
    assert main([str(argument) for argument in arguments]) == 0
    batches = load_calibration(tmp_path / "run" / "calibration.safetensors").batches
    assert batches[0]["hidden_states"].shape == (2, 16, LATENT_CHANNELS)
    assert set(QWEN.caption_inputs) <= batches[0].keys()


def test_a_schedule_of_its_own(folder, pipeline, codec, tmp_path):
    """As models made for few steps have it."""
    shutil.copytree(folder, tmp_path / "few", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "few" / "model_index.json"
    few = {**json.loads(path.read_text()), "sample_sigmas": [1.0, 0.6, 0.2]}
    path.write_text(json.dumps(few))
    own = open_codec(tmp_path / "few")
    assert own.timesteps(3, 24) != codec.timesteps(3, 24)
    with pytest.raises(ValueError, match="has sample_sigmas, of 3 steps; give --steps 3"):
        own.timesteps(4, 24)


def test_references_are_one_line(codec):
    with pytest.raises(
        ValueError, match="pipeline draws from text alone here and changes no pictures; leave"
    ):
        codec.text(["a cat"], torch.rand(1, 1, 3, 32, 32))


def test_a_missing_part_is_named(folder, tmp_path):
    check_missing_part(folder, tmp_path / "copy", "processor")
