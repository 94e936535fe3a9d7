"""The bundled teacher in the host: core's KSampler draws with it what the engine draws, and a
reader reads it right."""

import pytest
import torch

from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.rendered.captions import parse_caption, random_captions
from ppcl_engine.data.rendered.reader import load_reader, read, score
from ppcl_engine.data.sampling import draw, encode_prompts
from ppcl_engine.demo.bundled import TEACHER
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights

STEPS, SEED, CFG = 20, 3, 2.0
SAMPLING = {
    "seed": SEED,
    "cfg": CFG,
    "sampler_name": "euler",
    "scheduler": "simple",
    "denoise": 1.0,
}
# two versions of ComfyUI draw the same: each is within half of that of the engine
BETWEEN_HOSTS = 1e-3
BASE, BUNDLE = "demo/teacher.safetensors", "demo/demo.ppcl.safetensors"


@pytest.fixture(scope="module")
def bundle():
    """The one that comes with the pack."""
    return TEACHER.with_name("demo.ppcl.safetensors")


@pytest.fixture(scope="module")
def captions():
    return [c.text() for c in random_captions(8, torch.Generator().manual_seed(1))]


@pytest.fixture(scope="module")
def sampled(run_node, captions):
    """MODEL -> latents by core's nodes."""

    def run(model, steps=STEPS):
        positive, negative, latent = run_node("PPCL_DemoCaption", captions="\n".join(captions))
        (model,) = run_node("ModelSamplingAuraFlow", model=model, shift=1.0)
        conditioning = {"positive": positive, "negative": negative, "latent_image": latent}
        return run_node("KSampler", model=model, steps=steps, **conditioning, **SAMPLING)[0]

    return run


def drawn_by_the_engine(model, captions) -> torch.Tensor:
    """From the noise that KSampler takes for this seed."""
    codec = open_codec(TEACHER)
    prompts = encode_prompts(codec, captions)
    noise = torch.randn(len(captions), 16, 12, 12, generator=torch.manual_seed(SEED))
    architecture = Weights(TEACHER).architecture
    grid = architecture.grid(noise)
    clean = draw(architecture, model, architecture.pack(noise), grid, prompts, STEPS, CFG)
    return codec.pictures(architecture.unpack(clean, grid))


def test_the_teacher_draws_what_is_asked(load, sampled, run_node, captions):
    (pictures,) = run_node("PPCL_DemoDecode", latent=sampled(load(BASE)), enlarge=1)
    assert tuple(pictures.shape) == (8, 48, 48, 3)
    scores = score(
        read(load_reader(), pictures.movedim(-1, 1)), [parse_caption(c) for c in captions]
    )
    assert all(right.all() for right in scores.values())
    assert (
        pictures.movedim(-1, 1) - drawn_by_the_engine(open_model(TEACHER), captions)
    ).abs().max() < BETWEEN_HOSTS / 2


@pytest.mark.parametrize("variant", ["medium", "small"])
def test_a_variant_draws_what_the_engine_draws(
    load, switched, bundle, sampled, run_node, captions, variant
):
    model = switched(load(BUNDLE, base=BASE), variant=variant)
    (pictures,) = run_node("PPCL_DemoDecode", latent=sampled(model), enlarge=1)
    expected = drawn_by_the_engine(open_model(bundle, variant, TEACHER), captions)
    assert (pictures.movedim(-1, 1) - expected).abs().max() < BETWEEN_HOSTS / 2


def test_pictures_are_enlarged(run_node):
    latent = {"samples": torch.randn(2, 16, 1, 12, 12)}
    (small,), (large,) = (run_node("PPCL_DemoDecode", latent=latent, enlarge=n) for n in (1, 3))
    assert torch.equal(small, large[:, 1::3, 2::3]) and tuple(large.shape) == (2, 144, 144, 3)


@pytest.mark.parametrize(
    "captions, message",
    [
        ("a red lion", "does not know the word 'lion'"),
        ("", "0 captions are given; write 1 to 64"),
        ("a red K\na red K on a blue circle", "same number of words, these have 3 and 7"),
    ],
)
def test_bad_captions(run_node, captions, message):
    with pytest.raises(ValueError, match=message):
        run_node("PPCL_DemoCaption", captions=captions)


def test_a_latent_of_another_size(run_node):
    with pytest.raises(
        ValueError, match="this one is 4 x 1 x 64 x 64; use the latent of Demo Caption"
    ):
        run_node("PPCL_DemoDecode", latent={"samples": torch.zeros(1, 4, 64, 64)}, enlarge=1)
