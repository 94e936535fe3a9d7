"""A Qwen-Image-Edit folder gives what diffusers' own edit pipelines give, with one reference and
with several."""

from __future__ import annotations

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from PIL import Image
from transformers import ProcessorMixin, Qwen2VLProcessor

from ppcl_engine.architectures import REFERENCES, architecture_named
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.codecs.pipeline import read_part
from ppcl_engine.data.picture_files import load_references
from ppcl_engine.data.sampling import (
    draw_prompts,
    encode_edits,
    encode_prompts,
    reference_tokens,
    seeded_noise,
)
from ppcl_engine.models.opening import open_model

from ...tiny.qwen_image_edit_folder import build_tiny_edit_pipeline

CAPTIONS = ["make the sky red", "", "a cat by the sea"]
# as the pipelines make of a picture twice as wide as high where the area is 2048
HEIGHT, WIDTH = 32, 64
KINDS = {"edit": QwenImageEditPipeline, "plus": QwenImageEditPlusPipeline}
QWEN = architecture_named("qwen_image")


class WithoutFilms(Qwen2VLProcessor):
    """transformers' own, but for the part that reads films, which wants torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [self.image_token, self.video_token]
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, kind):
    path = tmp_path_factory.mktemp("edit") / "pipeline"
    return build_tiny_edit_pipeline(path, KINDS[kind].__name__, zero_cond_t=kind == "plus")


@pytest.fixture(scope="module")
def codec(folder):
    return open_codec(folder)


@pytest.fixture(scope="module")
def pipeline(folder, kind):
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Tokenizer,
        Qwen2VLImageProcessor,
    )

    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    return KINDS[kind](
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=read_part(AutoencoderKLQwenImage, folder / "vae"),
        text_encoder=read_part(Qwen2_5_VLForConditionalGeneration, folder / "text_encoder"),
        tokenizer=tokenizer,
        processor=WithoutFilms(
            Qwen2VLImageProcessor.from_pretrained(folder / "processor"), tokenizer
        ),
        transformer=open_model(folder),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory, kind):
    """The references of each caption, larger than they are drawn: two for the pipeline that reads
    several, else one."""
    folder, generator = tmp_path_factory.mktemp("references"), torch.Generator().manual_seed(0)
    rows = []
    for i in range(len(CAPTIONS)):
        rows.append([folder / f"{i}_{n}.png" for n in range(2 if kind == "plus" else 1)])
        for path in rows[-1]:
            small = (255 * torch.rand(4, 8, 3, generator=generator)).byte().numpy()
            Image.fromarray(small).resize((2 * WIDTH, 2 * HEIGHT)).save(path)
    return rows


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch, pipeline):
    """The pipelines' megapixel made as small as ours: the one constant of theirs that a test cannot
    afford."""
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", HEIGHT * WIDTH)
    calculate = edit.calculate_dimensions
    monkeypatch.setattr(
        edit, "calculate_dimensions", lambda area, ratio: calculate(HEIGHT * WIDTH, ratio)
    )


def opened(files, kind):
    images = [Image.open(path) for path in files]
    return images if kind == "plus" else images[0]


def test_the_template_is_as_long_as_released(pipeline):
    prefix = pipeline.prompt_template_encode.split("{}")[0].split("<|vision_start|>")[0]
    assert len(pipeline.tokenizer(prefix).input_ids) == pipeline.prompt_template_encode_start_idx


def test_text_is_what_the_pipeline_encodes_with_the_pictures(codec, pipeline, files, kind):
    pictures = load_references(files, (HEIGHT, WIDTH))
    text, mask = codec.text(CAPTIONS, pictures).values()
    for i, (caption, paths) in enumerate(zip(CAPTIONS, files, strict=True)):
        shown = opened(paths, kind)
        resize = pipeline.image_processor.resize
        if kind == "plus":
            width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, WIDTH / HEIGHT)
            shown = [resize(resize(image, HEIGHT, WIDTH), height, width) for image in shown]
        else:
            shown = resize(shown, HEIGHT, WIDTH)
        with torch.no_grad():
            expected, _ = pipeline.encode_prompt([caption], shown)
        torch.testing.assert_close(text[i][mask[i]], expected[0], rtol=0, atol=1e-4)
    other, _ = codec.text(CAPTIONS, 1 - pictures).values()
    assert (other - text).abs().max() > 1e-3 and (text[~mask] == 0).all()


def test_reference_tokens_are_the_pipelines(codec, pipeline, files, kind):
    tokens, grid = reference_tokens(QWEN, codec, load_references(files, (HEIGHT, WIDTH)))
    assert grid.tolist() == [[1, 4, 8]] * len(files[0])
    for i, paths in enumerate(files):
        images = [
            pipeline.image_processor.preprocess(Image.open(p), HEIGHT, WIDTH).unsqueeze(2)
            for p in paths
        ]
        given = images if kind == "plus" else images[0]
        with torch.no_grad():
            _, expected = pipeline.prepare_latents(
                given, 1, 4, HEIGHT, WIDTH, torch.float32, "cpu", None
            )
        torch.testing.assert_close(tokens[REFERENCES][i], expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_a_drawing_is_the_pipelines_own(folder, codec, pipeline, files, kind, guidance):
    """References in the sequence, in the text, and in what guidance takes away: the pipeline's call
    on the same noise."""
    # its call shrinks the picture for the text encoder from the file, we from what the VAE sees
    if kind == "plus":
        for path in (path for paths in files for path in paths):
            Image.open(path).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(path)
    prompts = encode_edits(QWEN, codec, CAPTIONS, files, HEIGHT, WIDTH)
    latents = draw_prompts(QWEN, open_model(folder), prompts, 7, 2, guidance, 2, "draw")
    for i, (caption, paths) in enumerate(zip(CAPTIONS, files, strict=True)):
        noise = seeded_noise(7, i, prompts.latent_shape)[None]
        expected = pipeline(
            opened(paths, kind),
            caption,
            negative_prompt="",
            true_cfg_scale=guidance,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=2,
            latents=QWEN.pack(noise),
            output_type="latent",
        ).images
        assert (latents[i] - noise[0]).abs().max() > 0.1
        torch.testing.assert_close(QWEN.pack(latents[i : i + 1]), expected, rtol=0, atol=1e-4)


def test_references_are_asked_for_and_counted(codec, files, kind):
    with pytest.raises(
        ValueError,
        match="is an edit model, whose captions change pictures: name them with --references$",
    ):
        encode_prompts(codec, CAPTIONS, HEIGHT, WIDTH)
    if kind == "edit":
        with pytest.raises(
            ValueError, match="pipeline reads one reference with an instruction; 2 are given$"
        ):
            encode_edits(QWEN, codec, CAPTIONS, [row * 2 for row in files], HEIGHT, WIDTH)
    with pytest.raises(
        ValueError, match="^30 x 64 pixels is not a multiple of 8; change --height and --width$"
    ):
        encode_edits(QWEN, codec, CAPTIONS, files, 30, WIDTH)
