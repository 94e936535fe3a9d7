"""A diffusers folder's text encoder, VAE and transformer give what diffusers' own pipeline
gives."""

import gc
import inspect
import json
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.codecs.pipeline import LATENT_SIDE, TEXT_TOKENS, TEXTS_AT_ONCE, PipelineCodec
from ppcl_engine.data.sampling import draw_prompts, encode_prompts, seeded_noise
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights

from ...tiny.qwen_image_folder import LATENT_CHANNELS, TEXT_WIDTH, build_tiny_pipeline

CAPTIONS = ["a red cat", "", "the image of the background, by the sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import QwenImagePipeline

    return QwenImagePipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def codec(folder):
    return open_codec(folder)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_folder_has_the_released_layout(folder, pipeline):
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < 30e6
    assert len(list((folder / "transformer").glob("*.safetensors"))) >= 2
    prefix = pipeline.prompt_template_encode.split("{}")[0]
    assert len(pipeline.tokenizer(prefix).input_ids) == pipeline.prompt_template_encode_start_idx


def test_codec_knows_its_sizes_without_loading_a_model(codec, pipeline):
    assert isinstance(codec, PipelineCodec)
    assert pipeline.default_sample_size == LATENT_SIDE
    assert codec.pixels_per_latent == pipeline.vae_scale_factor == 4
    assert codec.picture_size == (LATENT_SIDE * 4, LATENT_SIDE * 4)
    assert codec.latent_channels == LATENT_CHANNELS
    assert codec.dtype == torch.float32 and open_codec(codec.folder, "cuda").dtype == torch.bfloat16


def test_text_is_what_the_pipeline_encodes(codec, pipeline):
    with torch.no_grad():
        expected, expected_mask = pipeline.encode_prompt(CAPTIONS)
    text, mask = codec.text(CAPTIONS).values()
    assert text.shape[2] == TEXT_WIDTH and text.dtype == torch.float32 and not text.requires_grad
    assert torch.equal(text, expected)
    assert mask.dtype == torch.bool and torch.equal(mask, expected_mask.bool())


def test_one_caption_has_a_mask_though_the_pipeline_gives_none(codec, pipeline):
    with torch.no_grad():
        expected, expected_mask = pipeline.encode_prompt(CAPTIONS[0])
    text, mask = codec.text(CAPTIONS[:1]).values()
    assert expected_mask is None and mask.all() and mask.shape == text.shape[:2]
    assert torch.equal(text, expected)


def test_many_captions_are_encoded_in_parts(codec):
    captions = ["a" * (i % 5) for i in range(2 * TEXTS_AT_ONCE + 1)]
    text, mask = codec.text(captions).values()
    assert len(text) == len(captions) and (text[~mask] == 0).all()
    for i in (0, TEXTS_AT_ONCE + 1, 2 * TEXTS_AT_ONCE):
        alone, alone_mask = codec.text(captions[i : i + 1]).values()
        torch.testing.assert_close(text[i][mask[i]], alone[0][alone_mask[0]])


def test_long_captions_are_cut_where_the_pipeline_cuts_them(codec, pipeline):
    limit = inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default
    caption = "x" * 600
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt([caption], max_sequence_length=limit)
    text, mask = codec.text([caption]).values()
    assert limit == TEXT_TOKENS and mask.shape == (1, limit)
    assert torch.equal(text, expected)


def test_pictures_are_decoded_as_the_pipeline_decodes_them(codec, pipeline):
    latents = normal(2, LATENT_CHANNELS, 8, 12)
    text, mask = codec.text(CAPTIONS[:2]).values()
    pipeline.scheduler.step, step = (
        lambda velocity, t, x, return_dict: (x,),
        pipeline.scheduler.step,
    )
    try:  # a scheduler that stands still: the pipeline decodes the latents it was given
        tokens = architecture_named("qwen_image").pack(latents)
        given = {"latents": tokens, "prompt_embeds": text, "prompt_embeds_mask": mask.long()}
        expected = pipeline(
            height=32, width=48, num_inference_steps=2, output_type="pt", **given
        ).images
    finally:
        pipeline.scheduler.step = step
    pictures = codec.pictures(latents)
    assert pictures.shape == (2, 3, 32, 48) and 0 <= pictures.min() < pictures.max() <= 1
    # batched there, one by one here
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_a_codec_on_a_gpu_gives_what_the_cpus_does(folder, codec):
    """To the precision of bfloat16, in which it computes there; what it returns is in memory."""
    ours, latents = open_codec(folder, "cuda"), normal(1, LATENT_CHANNELS, 8, 12)
    found, expected = (c.text(CAPTIONS[:1])["encoder_hidden_states"].float() for c in (ours, codec))
    assert (found.cpu() - expected).norm() < 0.1 * expected.norm()
    before = torch.cuda.memory_allocated()
    pictures = ours.pictures(latents)
    assert pictures.device.type == "cpu" and pictures.dtype is torch.float32
    torch.testing.assert_close(pictures, codec.pictures(latents), rtol=0, atol=0.05)
    ours.release()
    assert torch.cuda.memory_allocated() < before


def test_latents_are_the_normalised_mode_of_the_posterior(codec, pipeline):
    pictures = normal(2, 3, 32, 48).sigmoid()
    latents = codec.latents(pictures)
    assert latents.shape == (2, LATENT_CHANNELS, 8, 12) and not latents.requires_grad
    config = pipeline.vae.config
    with torch.no_grad():
        mode = pipeline.vae.encode(2 * pictures[:, :, None] - 1).latent_dist.mode()[:, :, 0]
    for channel in range(LATENT_CHANNELS):
        expected = (mode[:, channel] - config.latents_mean[channel]) / config.latents_std[channel]
        torch.testing.assert_close(latents[:, channel], expected, rtol=1e-5, atol=1e-5)
    assert codec.pictures(latents).shape == pictures.shape


def test_latents_and_pictures_undo_each_other_normalisation(codec, monkeypatch):
    """With a VAE that changes nothing, there and back is the identity."""
    vae = SimpleNamespace(
        config=codec._open_vae().config,
        encode=lambda x: SimpleNamespace(
            latent_dist=SimpleNamespace(mode=lambda: torch.cat([x, x[:, :1]], 1))
        ),
        decode=lambda z: SimpleNamespace(sample=z[:, :3]),
    )
    monkeypatch.setattr(codec, "_vae", vae)
    pictures = normal(2, 3, 4, 4).sigmoid()
    torch.testing.assert_close(codec.pictures(codec.latents(pictures)), pictures)


def test_release_frees_both_models_and_the_codec_still_works(folder):
    codec = open_codec(folder)
    text, _ = codec.text(CAPTIONS).values()
    codec.pictures(normal(1, LATENT_CHANNELS, 2, 2))
    kept = [weakref.ref(codec._text_pipeline.text_encoder), weakref.ref(codec._vae)]
    gc.collect()
    assert all(reference() is not None for reference in kept)
    codec.release()
    assert all(reference() is None for reference in kept)
    assert torch.equal(codec.text(CAPTIONS)["encoder_hidden_states"], text)


@pytest.mark.parametrize("steps, guidance", [(2, 3.5), (5, 2.0), (3, 1.0)])
def test_a_drawing_is_the_pipelines_own(folder, pipeline, codec, steps, guidance):
    """Shifted timesteps and rescaled guidance: latents and pictures of the pipeline's call from the
    same noise."""
    architecture = architecture_named("qwen_image")
    prompts = encode_prompts(codec, CAPTIONS, height=32, width=48)
    latents = draw_prompts(architecture, open_model(folder), prompts, 7, steps, guidance, 2, "draw")
    noise = torch.stack([seeded_noise(7, i, prompts.latent_shape) for i in range(len(CAPTIONS))])
    call = {"prompt": CAPTIONS, "negative_prompt": [""] * len(CAPTIONS), "true_cfg_scale": guidance}
    call |= {
        "height": 32,
        "width": 48,
        "num_inference_steps": steps,
        "latents": architecture.pack(noise),
    }
    expected = pipeline(**call, output_type="latent").images
    assert (latents - noise).abs().max() > 0.1
    torch.testing.assert_close(architecture.pack(latents), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        codec.pictures(latents), pipeline(**call, output_type="pt").images, rtol=0, atol=1e-4
    )


def test_timesteps_are_shifted_for_the_pictures_size(folder, codec, tmp_path):
    small, large = codec.timesteps(4, 256), codec.timesteps(4, 8192)
    assert len(small) == len(large) == 5 and small == sorted(small, reverse=True)
    assert small[0] == large[0] == 1 and small[-1] == large[-1] == 0
    assert small[-2] == pytest.approx(0.02) and all(
        a < b for a, b in zip(small[1:3], large[1:3], strict=True)
    )
    with pytest.raises(
        ValueError, match="has a shift_terminal, which needs 2 steps; raise --steps$"
    ):
        codec.timesteps(1, 256)
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_json(
        copy / "scheduler" / "scheduler_config.json",
        use_dynamic_shifting=False,
        shift_terminal=None,
    )
    assert open_codec(copy).timesteps(4, 256) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert open_codec(copy).timesteps(1, 256) == [1.0, 0.0]


def test_sizes_that_do_not_divide_are_refused_before_anything_is_encoded(codec):
    codec.release()
    with pytest.raises(
        ValueError, match="^32 x 44 pixels is not a multiple of 8; change --height and --width$"
    ):
        encode_prompts(codec, CAPTIONS, height=32, width=44)
    assert codec._text_pipeline is None


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_class(copy):
    edit_json(copy / "model_index.json", _class_name="SanaPipeline")


def edit_scheduler(copy):
    edit_json(copy / "scheduler" / "scheduler_config.json", _class_name="UniPCMultistepScheduler")


def break_merges(copy):
    (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\nz q\n")


def cut_weights(copy):
    file = copy / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            edit_class,
            r"names SanaPipeline; known pipelines: QwenImagePipeline, .*FluxPipeline, StableDiffusion3Pipeline, ZImagePipeline, QwenImage21Pipeline$",
        ),
        (
            edit_scheduler,
            r"names UniPCMultistepScheduler; known schedulers: FlowMatchEulerDiscreteScheduler$",
        ),
        (
            lambda copy: shutil.rmtree(copy / "scheduler"),
            r"has no scheduler/scheduler_config.json; download",
        ),
        (lambda copy: shutil.rmtree(copy / "vae"), r"has no vae/config.json; download"),
        (
            lambda copy: shutil.rmtree(copy / "text_encoder"),
            r"has no text_encoder/config.json; download",
        ),
        (lambda copy: shutil.rmtree(copy / "tokenizer"), r"has no tokenizer; download"),
        (
            lambda copy: (copy / "tokenizer" / "vocab.json").unlink(),
            r"tokenizer has neither tokenizer.json nor vocab",
        ),
        (
            lambda copy: (copy / "tokenizer" / "vocab.json").write_text("{"),
            r"tokenizer cannot be read \(.*BPE",
        ),
        (break_merges, r"tokenizer cannot be read \(.*zq"),
        (
            lambda copy: (copy / "text_encoder" / "model.safetensors").unlink(),
            r"text_encoder has no .safetensors file",
        ),
        (cut_weights, r"model.safetensors is truncated"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder, tmp_path, damage, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises(ValueError, match=message) as error:
        open_codec(copy).text(["a"])
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_shard_of_the_text_encoder_is_named(folder, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    copy = shutil.copytree(folder, tmp_path / "copy")
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(copy / "text_encoder")
    (copy / "text_encoder" / "model.safetensors").unlink()
    encoder.save_pretrained(copy / "text_encoder", max_shard_size="150KB")
    shards = sorted((copy / "text_encoder").glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(
        ValueError, match=f"text_encoder cannot be read .*{shards[1].name}.*; download"
    ) as error:
        open_codec(copy).text(["a"])
    assert "\n" not in str(error.value)


def test_sharded_transformer_is_read_and_equals_diffusers(folder, pipeline, codec):
    architecture = architecture_named("qwen_image")
    assert Weights(folder).num_blocks == 6 and Weights(folder).architecture.name == "qwen_image"
    model = open_model(folder)
    text, mask = codec.text(CAPTIONS).values()
    latents = normal(len(CAPTIONS), LATENT_CHANNELS, 8, 12)
    inputs = {
        "hidden_states": architecture.pack(latents),
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.1, 0.5, 0.9]),
        "grid": architecture.grid(latents),
    }
    with torch.no_grad():
        ours = architecture.call(model, inputs)
        theirs = architecture.call(pipeline.transformer, inputs)
    assert ours.shape == (len(CAPTIONS), 4 * 6, 4 * LATENT_CHANNELS) and torch.equal(ours, theirs)


def test_an_all_true_mask_means_the_same_as_the_pipelines_none(pipeline, codec):
    architecture = architecture_named("qwen_image")
    text, mask = codec.text(CAPTIONS[:1]).values()
    inputs = architecture.random_inputs(
        dict(pipeline.transformer.config), 1, (1, 4, 6), text.shape[1], "cpu"
    )
    inputs |= {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}
    without = {name: t for name, t in inputs.items() if name != "encoder_hidden_states_mask"}
    with torch.no_grad():
        outputs = [architecture.call(pipeline.transformer, given) for given in (inputs, without)]
    torch.testing.assert_close(*outputs)
