"""Qwen-Image against diffusers: the same forward bit for bit, the released model's sizes,
packing."""

from dataclasses import replace

import pytest
import torch

from ppcl_engine.architectures import (
    ARCHITECTURES,
    REFERENCES,
    architecture_named,
    detect_architecture,
)
from ppcl_engine.models.weights import expected_shapes

BLOCK_PARAMETERS = 339_831_296
OUTER_PARAMETERS = 40_523_328


def by_blocks(architecture, model, inputs):
    with torch.no_grad():
        state = architecture.embed(model, inputs)
        for block in model.transformer_blocks:
            state = architecture.run_block(block, state)
        return architecture.finish(model, state)


@pytest.mark.parametrize("padding", ["masked", "none", "no mask"])
def test_block_by_block_equals_diffusers(architecture, model, padded_inputs, padding):
    inputs = padded_inputs()
    assert not inputs["encoder_hidden_states_mask"].all()
    if padding == "none":
        inputs["encoder_hidden_states_mask"] = torch.ones_like(inputs["encoder_hidden_states_mask"])
    elif padding == "no mask":
        del inputs["encoder_hidden_states_mask"]
    whole = architecture.call(model, inputs)
    assert torch.equal(by_blocks(architecture, model, inputs), whole)
    assert whole.std() > 0.1


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("references", [(), ((1, 2, 3),), ((1, 4, 2), (1, 1, 5))])
def test_an_edit_model_equals_diffusers(
    architecture, make_model, padded_inputs, references, zero_cond_t
):
    """References of other sizes stand behind the picture's tokens, and nothing of what comes out is
    theirs; with zero_cond_t they are modulated as at t = 0."""
    model, inputs = make_model(zero_cond_t=zero_cond_t), padded_inputs(references=references)
    tokens = [inputs[name] for name in ("hidden_states", REFERENCES) if name in inputs]
    theirs = model(
        hidden_states=torch.cat(tokens, 1),
        encoder_hidden_states=inputs["encoder_hidden_states"],
        encoder_hidden_states_mask=inputs["encoder_hidden_states_mask"],
        timestep=inputs["timestep"],
        img_shapes=[[(1, 2, 3), *references]] * 6,
        return_dict=False,
    )[0][:, :6]
    assert torch.equal(architecture.call(model, inputs), theirs)
    assert torch.equal(by_blocks(architecture, model, inputs), theirs)
    plain = make_model()
    plain.load_state_dict(model.state_dict())
    same = torch.allclose(theirs, architecture.call(plain, inputs), atol=1e-5)
    assert same == (not references or not zero_cond_t)


@pytest.mark.parametrize("references", [((1, 2, 2),), ((1, 2, 3), (1, 2, 3)), ()])
def test_references_that_are_not_as_large_as_they_say_are_one_line(
    architecture, model, padded_inputs, references
):
    inputs = padded_inputs(references=((1, 2, 3),))
    inputs["grid"] = torch.tensor([(1, 2, 3), *references])
    with pytest.raises(
        ValueError, match=r"have 6 \+ 6 tokens, their sizes are 2 x 3.*; calibrate again, with .*$"
    ):
        architecture.embed(model, inputs)


def test_references_count_or_not(architecture, model, padded_inputs):
    state = architecture.embed(model, padded_inputs(references=((1, 2, 2),)))
    assert state.image.shape[1] == 10 and state.real("image").all()
    alone = replace(state, target_only=True)
    assert alone.real("image")[0].tolist() == [True] * 6 + [False] * 4
    assert torch.equal(alone.real_tokens("image"), state.image[:, :6].flatten(0, 1))
    assert torch.equal(alone.real_tokens("text"), state.real_tokens("text"))
    plain = replace(architecture.embed(model, padded_inputs()), target_only=True)
    assert plain.real("image").all()


def test_padding_changes_nothing(architecture, model, padded_inputs):
    inputs = padded_inputs()
    mask = inputs["encoder_hidden_states_mask"]
    other = torch.where(mask[..., None], inputs["encoder_hidden_states"], 77.0)
    states = [
        architecture.embed(model, inputs),
        architecture.embed(model, {**inputs, "encoder_hidden_states": other}),
    ]
    for block in model.transformer_blocks:
        states = [architecture.run_block(block, state) for state in states]
    assert torch.equal(states[0].image, states[1].image)
    assert torch.equal(states[0].real_tokens("text"), states[1].real_tokens("text"))
    assert (
        len(states[0].real_tokens("text")) == int(mask.sum())
        and len(states[0].real_tokens("image")) == 6 * 6
    )
    assert not torch.equal(states[0].text, states[1].text)


def test_assembled_parts_are_diffusers_model(architecture, model, padded_inputs):
    config = architecture.tiny_config
    outer = architecture.build_outer(config)
    outer.load_state_dict(
        {n: t for n, t in model.state_dict().items() if not n.startswith("transformer_blocks.")}
    )
    assert len(outer.transformer_blocks) == 0
    built = architecture.assemble(
        outer, config, [architecture.build_block(config, i) for i in range(6)]
    )
    built.load_state_dict(model.state_dict())
    assert type(built) is type(model) and built.config.num_layers == 6
    assert torch.equal(
        architecture.call(built.eval(), padded_inputs()), architecture.call(model, padded_inputs())
    )


def test_the_released_model_has_its_published_size(architecture):
    config = architecture.model_configs["qwen_image"]
    sizes = {
        name: torch.Size(shape).numel()
        for name, shape in expected_shapes(architecture, config).items()
    }
    prefixes = [architecture.block_prefix(config, index) for index in range(60)]
    blocks = [sum(n for name, n in sizes.items() if name.startswith(prefix)) for prefix in prefixes]
    assert architecture.num_blocks(config) == 60 and architecture.width(config) == 3072
    assert blocks == [BLOCK_PARAMETERS] * 60
    assert sum(sizes.values()) - sum(blocks) == OUTER_PARAMETERS
    assert sum(sizes.values()) == 20_430_401_088


def test_the_full_size_class_is_ours_block_for_block(architecture):
    from diffusers import QwenImageTransformer2DModel

    config = architecture.model_configs["qwen_image"]
    with torch.device("meta"):
        theirs = QwenImageTransformer2DModel()  # diffusers' defaults are the released model
    assert {n: tuple(t.shape) for n, t in theirs.state_dict().items()} == expected_shapes(
        architecture, config
    )
    assert {
        name: theirs.config[name] if name != "axes_dims_rope" else list(theirs.config[name])
        for name in config
    } == config


@pytest.mark.parametrize("size", ["full", "head 32"])
def test_shapes_alone_give_the_configuration(architecture, size):
    tiny = {**architecture.tiny_config, "attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]}
    config = tiny if size == "head 32" else architecture.model_configs["qwen_image"]
    shapes = expected_shapes(architecture, config)
    assert architecture.infer_config(lambda key: shapes[key], shapes) == config


def test_pack_is_diffusers_and_unpack_its_inverse(architecture):
    from diffusers import QwenImagePipeline

    latents = torch.randn(2, 4, 6, 10)
    tokens = architecture.pack(latents)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(latents, 2, 4, 6, 10))
    grid = architecture.grid(latents)
    assert grid.tolist() == [[1, 3, 5]] and tokens.shape == (2, 15, 16)
    assert torch.equal(architecture.unpack(tokens, grid), latents)
    reference = torch.cat([tokens, torch.randn(2, 6, 16)], 1)  # an edit model's second picture
    assert torch.equal(
        architecture.unpack(reference, torch.cat([grid, torch.tensor([[1, 2, 3]])])), latents
    )


def test_odd_sides_are_no_whole_number_of_tokens(architecture):
    with pytest.raises(
        ValueError,
        match="^latents of 6 x 7 cannot be packed into tokens of 2 x 2; resize the picture$",
    ):
        architecture.pack(torch.randn(1, 4, 6, 7))


def test_the_last_text_is_not_used(architecture):
    used = [architecture.used_streams(architecture.tiny_config, index) for index in range(6)]
    assert used == [("image", "text")] * 5 + [("image",)]


def test_the_registry_names_what_it_knows(architecture):
    assert architecture_named("qwen_image") is architecture in ARCHITECTURES
    with pytest.raises(ValueError, match="unknown architecture 'flux'; known: qwen_image, flux1"):
        architecture_named("flux")
    keys = expected_shapes(architecture, architecture.tiny_config)
    assert detect_architecture(keys, "file") is architecture
    with pytest.raises(
        ValueError,
        match="file is of no known architecture .known: qwen_image, flux1, sd35, z_image, qwen_image_21.; its first keys: a, b, c, d$",
    ):
        detect_architecture("edcba", "file")
