"""The trainer of the small teachers: files that every host reads, and the same bits after a
stop."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.rendered.tables import fit_codec
from ppcl_engine.demo import train as trainer
from ppcl_engine.demo.train import (
    KINDS,
    Kind,
    Recipe,
    blocks_of,
    new_teacher,
    save_teacher,
    train,
    training_batch,
)
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights
from ppcl_engine.system.tensor_files import TensorFile

CAPTIONS = [
    "a red K on a blue circle, yellow background",
    "a blue K on a red circle, yellow background",
    "",
]


def recipe(name: str, **changes) -> Recipe:
    return Recipe(teacher=name, steps=4, batch=3, save_every=2, **changes)


@pytest.fixture(scope="module")
def flux_codec():
    return fit_codec(0, positions=True, samples=64)


def test_captions_of_a_model_that_masks_nothing(flux_codec):
    """One length, positions that tell the same words in another order apart, and the mean of the
    words."""
    text = flux_codec.text(CAPTIONS)
    assert set(text) == {"encoder_hidden_states", "pooled_projections"}
    words, pooled = text["encoder_hidden_states"], text["pooled_projections"]
    assert words.shape == (3, 9, 64) and not torch.equal(words[0], words[1])
    assert torch.allclose(pooled[0], pooled[1], atol=1e-6) and torch.equal(
        pooled[2], flux_codec.token_embedding[0]
    )
    assert torch.equal(flux_codec.text(CAPTIONS[2:])["encoder_hidden_states"][0], words[2])
    with pytest.raises(ValueError, match="has 10 words; this model reads 9"):
        flux_codec.text([f"a {CAPTIONS[0]}"])


def test_both_codecs_have_the_same_tables(flux_codec):
    plain = fit_codec(0, samples=64).tensors()
    assert all(torch.equal(tensor, flux_codec.tensors()[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("name", KINDS)
def test_a_new_teacher_is_the_identity_that_predicts_nothing(name):
    kind = KINDS[name]
    model = new_teacher(kind, seed=0)
    inputs, velocity = training_batch(
        kind, fit_codec(0, kind.numbered, samples=64), recipe(name), step=0
    )
    with torch.no_grad():
        state = before = kind.architecture.embed(model, inputs)
        for block in blocks_of(kind, model):
            state = kind.architecture.run_block(block, state)
        assert torch.equal(state.image, before.image) and torch.equal(state.text, before.text)
        assert (kind.architecture.finish(model, state) == 0).all()
    assert velocity.shape == inputs["hidden_states"].shape == (3, 36, 64)
    assert all(
        p.abs().sum() > 0
        for n, p in model.named_parameters()
        if n.endswith("blocks.0.proj_out.weight")
    )


@pytest.fixture
def fitted_to_few(monkeypatch):
    """A training's codec is fitted to 64 pictures, not to thousands."""
    monkeypatch.setattr(trainer, "fit_codec", partial(fit_codec, samples=64))


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_training_goes_on_to_the_same_file(name, tmp_path, monkeypatch, fitted_to_few):
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    train(recipe(name), whole, compiled=False, device="cpu")
    batch = training_batch

    def killed_at_three(kind, codec, recipe, step):
        if step == 3:
            raise KeyboardInterrupt
        return batch(kind, codec, recipe, step)

    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr(trainer, "training_batch", killed_at_three)
        train(recipe(name), stopped, compiled=False, device="cpu")
    train(recipe(name), stopped, compiled=False, device="cpu")
    assert stopped.read_bytes() == whole.read_bytes()
    with pytest.raises(SystemExit, match="was made with other options"):
        train(recipe(name, seed=1), stopped, compiled=False, device="cpu")
    _check_file(whole, name)


def test_a_file_holds_what_no_training_moves_too(tmp_path):
    """SD3.5 brings a table of positions that is no parameter."""
    architecture = architecture_named("sd35")
    channels = {
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    }
    kind = Kind(
        architecture=architecture,
        config={**architecture.tiny_config, **channels},
        numbered=True,
        zeroed=r"norm1?(_context)?\.linear|norm_out|^proj_out",
    )
    model, path = new_teacher(kind, seed=0), tmp_path / "sd35.safetensors"
    assert "pos_embed.pos_embed" not in dict(model.named_parameters())
    save_teacher(
        kind, path, recipe("qwen"), 0, model.state_dict(), fit_codec(0, positions=True, samples=64)
    )
    weights, state = Weights(path), model.state_dict()
    assert set(weights.keys()) == set(state)
    assert all(torch.equal(weights.read(key), state[key].bfloat16()) for key in weights.keys())


def _check_file(path, name: str) -> None:
    """In ComfyUI's layout, with its codec, at most 20 MB."""
    kind, weights = KINDS[name], Weights(path)
    assert path.stat().st_size < 20e6 and weights.architecture is kind.architecture
    assert {k: weights.config[k] for k in kind.config} == kind.config
    assert json.loads(TensorFile(path).metadata["recipe"])["teacher"] == name
    assert (open_codec(path).position_embedding is not None) == kind.numbered
    inputs, _ = training_batch(kind, open_codec(path), recipe(name), step=0)
    with torch.no_grad():
        velocity = kind.architecture.call(open_model(path), inputs)
    assert velocity.abs().max() > 0 and velocity.isfinite().all()
