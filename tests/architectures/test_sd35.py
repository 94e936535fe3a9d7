"""SD3.5 against diffusers: the same forward bit for bit, and both layouts' names."""

from functools import partial

import pytest
import torch

from ppcl_engine.architectures import architecture_named, detect_architecture
from ppcl_engine.models.weights import expected_shapes

from ..tiny.models import check_comfyui_file, comfyui_state, tiny_inputs, tiny_model

SD35 = architecture_named("sd35")
TINY = SD35.tiny_config
SINGLE_ATTENTION = {"dual_attention_layers": []}


make_model, make_inputs = partial(tiny_model, SD35), partial(tiny_inputs, SD35)
in_comfyui = partial(comfyui_state, SD35)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize(
    "changes", [{}, SINGLE_ATTENTION, {"out_channels": 6}], ids=["dual", "single", "other output"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_by_block_equals_diffusers(changes, dtype):
    model = make_model(**changes).to(dtype)
    inputs = {
        name: t.to(dtype) if name not in ("grid", "timestep") else t
        for name, t in make_inputs(**changes).items()
    }
    with torch.no_grad():
        latents = SD35.unpack(inputs["hidden_states"], inputs["grid"])
        assert latents.shape == (4, 4, 4, 6) and torch.equal(
            SD35.pack(latents), inputs["hidden_states"]
        )
        theirs = model(
            hidden_states=latents,
            encoder_hidden_states=inputs["encoder_hidden_states"],
            pooled_projections=inputs["pooled_projections"],
            timestep=inputs["timestep"] * 1000,
            return_dict=False,
        )[0]
        whole = SD35.call(model, inputs)
        assert torch.equal(SD35.unpack(whole, inputs["grid"]), theirs)
        state = SD35.embed(model, inputs)
        for block in model.transformer_blocks:
            state = SD35.run_block(block, state)
        assert torch.equal(SD35.finish(model, state), whole)
    assert whole.std() > 0.1


@pytest.mark.parametrize(
    "name", ["timestep", "pooled_projections", "encoder_hidden_states", "grid"]
)
def test_everything_that_is_given_is_read(model, name):
    inputs = make_inputs()
    other = {**inputs, name: inputs[name] + 0.5 if name != "grid" else inputs[name][:, [0, 2, 1]]}
    assert not torch.equal(SD35.call(model, inputs), SD35.call(model, other))


@pytest.mark.parametrize("rows, columns", [(2, 4), (6, 8), (12, 1)])
def test_positions_are_cut_from_the_middle_of_the_table(model, rows, columns):
    inputs = make_inputs(grid=(1, rows, columns), samples=1)
    inputs["hidden_states"] *= 0
    table, top, left = (
        model.pos_embed.pos_embed.view(12, 12, 32),
        (12 - rows) // 2,
        (12 - columns) // 2,
    )
    expected = (
        table[top : top + rows, left : left + columns].reshape(1, -1, 32)
        + model.pos_embed.proj.bias
    )
    torch.testing.assert_close(SD35.embed(model, inputs).image, expected)


def test_a_picture_that_is_larger_than_the_table_is_refused(model):
    with pytest.raises(ValueError, match="cannot be greater than `pos_embed_max_size`: 12"):
        SD35.embed(model, make_inputs(grid=(1, 13, 2)))


def test_latents_have_the_configurations_channels():
    assert SD35.latent_shape(SD35.model_configs["sd35_large"], 1024, 768) == (16, 128, 96)
    with pytest.raises(ValueError, match="1000 x 768 pixels is not a multiple of 16"):
        SD35.latent_shape(TINY, 1000, 768)


def test_assembled_parts_are_diffusers_model(model):
    outer = SD35.build_outer(TINY)
    outer.load_state_dict(
        {n: t for n, t in model.state_dict().items() if "transformer_blocks." not in n}
    )
    built = SD35.assemble(outer, TINY, [SD35.build_block(TINY, i) for i in range(6)])
    built.load_state_dict(model.state_dict())
    assert type(built) is type(model) and built.config.num_layers == 6
    assert torch.equal(SD35.call(built.eval(), make_inputs()), SD35.call(model, make_inputs()))


@pytest.mark.parametrize("name", ["sd35_large", "sd35_medium"])
def test_the_full_size_class_is_ours_block_for_block(name):
    from diffusers import SD3Transformer2DModel

    config = SD35.model_configs[name]
    with torch.device("meta"):
        theirs = SD3Transformer2DModel(**config)
    assert {n: tuple(t.shape) for n, t in theirs.state_dict().items()} == expected_shapes(
        SD35, config
    )


CONFIGS = [
    *SD35.model_configs.values(),
    {**TINY, "sample_size": 128},
    {**TINY, **SINGLE_ATTENTION, "sample_size": 128},
]


@pytest.mark.parametrize("config", CONFIGS, ids=["large", "medium", "tiny dual", "tiny"])
def test_shapes_alone_give_the_configuration(config):
    shapes = expected_shapes(SD35, config)
    assert SD35.infer_config(lambda key: shapes[key], shapes) == config


@pytest.mark.parametrize("name", ["sd35_large", "sd35_medium"])
def test_names_are_total_both_ways(name):
    """Every tensor of diffusers has a place, every piece of ComfyUI's tensors is filled once, and
    back."""
    keys, pieces = list(expected_shapes(SD35, SD35.model_configs[name])), {}
    for key in keys:
        part = SD35.to_comfyui(key, keys)
        pieces.setdefault(part.name, []).extend(part.pieces)
        assert len(part.pieces) <= part.of and key in SD35.from_comfyui(part.name)
    assert all(sorted(found) == list(range(len(found))) for found in pieces.values())
    assert sorted(
        key for name in pieces for key in SD35.from_comfyui(name) if key in keys
    ) == sorted(keys)
    with pytest.raises(KeyError):
        SD35.to_comfyui("transformer_blocks.0.attn.to_x.weight", keys)
    assert SD35.from_comfyui("joint_blocks.0.other") == ("joint_blocks.0.other",)


@pytest.mark.parametrize("dual", [[], [0, 1]], ids=["large", "medium"])
def test_comfyui_tensors_become_diffusers_as_diffusers_converts_them(dual):
    """Against diffusers' own converter, which cuts tensors by the released width."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    model = make_model(num_layers=4, dual_attention_layers=dual)
    stored = in_comfyui(model)
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(dict(stored))
    expected = model.state_dict()
    assert theirs.keys() == expected.keys() and all(
        torch.equal(theirs[k], t) for k, t in expected.items()
    )


@pytest.mark.parametrize("changes", [{}, SINGLE_ATTENTION], ids=["dual", "single"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_comfyui_file_is_read_as_the_model_itself(tmp_path, prefix, changes):
    weights = check_comfyui_file(SD35, make_model(**changes), make_inputs(), tmp_path, prefix)
    assert weights.config == {**TINY, **changes, "sample_size": 128}


def test_other_models_are_not_taken_for_it(model):
    assert detect_architecture(model.state_dict(), "file") is SD35
    assert detect_architecture(in_comfyui(model), "file") is SD35
    older = make_model(qk_norm=None, **SINGLE_ATTENTION)
    for state in (older.state_dict(), in_comfyui(older)):
        with pytest.raises(
            ValueError, match="no known architecture .known: qwen_image, flux1, sd35."
        ):
            detect_architecture(state, "file")
    for other in (architecture_named("qwen_image"), architecture_named("flux1")):
        assert not SD35.detect(expected_shapes(other, other.tiny_config)) and not other.detect(
            model.state_dict()
        )
        assert not other.detect(in_comfyui(model))


def test_the_last_block_gives_no_text_and_stands_alone(model):
    used = [SD35.used_streams(TINY, index) for index in range(6)]
    assert used == [("image", "text")] * 5 + [("image",)]
    assert SD35.sections(TINY) == (range(5), range(5, 6))
    state = SD35.embed(model, make_inputs())
    assert torch.equal(SD35.run_block(model.transformer_blocks[5], state).text, state.text)


def test_blocks_that_are_kept_give_the_configuration():
    kept = SD35.with_blocks(TINY, [0, 2, 3, 5])
    assert (kept["num_layers"], kept["dual_attention_layers"]) == (4, [0, 1])
    assert SD35.with_blocks(TINY, range(6)) == TINY
    large = SD35.with_blocks(SD35.model_configs["sd35_large"], [0, 1, 37])
    assert (large["num_layers"], large["dual_attention_layers"]) == (3, [])
