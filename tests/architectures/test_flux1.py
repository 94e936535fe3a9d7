"""FLUX.1 against diffusers: the same forward bit for bit, the released models' sizes, and both
layouts' names."""

from functools import partial

import pytest
import torch

from ppcl_engine.architectures import architecture_named, detect_architecture
from ppcl_engine.models.tensor_sources import Source, comfyui_sources
from ppcl_engine.models.weights import expected_shapes

from ..tiny.models import check_comfyui_file, comfyui_state, tiny_inputs, tiny_model

FLUX = architecture_named("flux1")
SIZES = {"flux1_dev": (11_901_408_320, 19), "flux1_lite": (8_163_264_064, 8)}
DOUBLE, SINGLE = 339_831_296, 141_591_808  # 36 d^2 + 30 d + 512, 15 d^2 + 11 d + 256
# the released models' proportions
HEAD_32 = {"attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]}


make_model, make_inputs = partial(tiny_model, FLUX), partial(tiny_inputs, FLUX)
in_comfyui = partial(comfyui_state, FLUX)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("guidance_embeds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_by_block_equals_diffusers(guidance_embeds, dtype):
    model = make_model(guidance_embeds=guidance_embeds).to(dtype)
    inputs = {
        name: t.to(dtype) if name not in ("grid", "timestep") else t
        for name, t in make_inputs(guidance_embeds=guidance_embeds).items()
    }
    assert ("guidance" in inputs) == guidance_embeds
    with torch.no_grad():
        whole = FLUX.call(model, inputs)
        state = FLUX.embed(model, inputs)
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            state = FLUX.run_block(block, state)
        assert torch.equal(FLUX.finish(model, state), whole)
    assert whole.std() > 0.1


def test_positions_are_the_pipelines(model):
    """Rows and columns from the grid; a second picture is told from the first by its number."""
    from diffusers import FluxPipeline

    inputs = make_inputs(grid=(1, 3, 4))
    ids = FLUX._image_ids(inputs)
    assert torch.equal(ids, FluxPipeline._prepare_latent_image_ids(1, 3, 4, "cpu", torch.float32))
    two = FLUX._image_ids({**inputs, "grid": torch.tensor([[1, 3, 4], [1, 1, 2]])})
    assert torch.equal(two[:12], ids) and two[12:].tolist() == [[1, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    "name", ["timestep", "guidance", "pooled_projections", "encoder_hidden_states"]
)
def test_everything_that_is_given_is_read(model, name):
    inputs = make_inputs()
    other = {**inputs, name: inputs[name] + 0.5}
    assert not torch.equal(FLUX.call(model, inputs), FLUX.call(model, other))


def test_assembled_parts_are_diffusers_model(model):
    config = FLUX.tiny_config
    outer = FLUX.build_outer(config)
    outer.load_state_dict(
        {n: t for n, t in model.state_dict().items() if "transformer_blocks." not in n}
    )
    built = FLUX.assemble(outer, config, [FLUX.build_block(config, i) for i in range(8)])
    built.load_state_dict(model.state_dict())
    assert type(built) is type(model) and (
        built.config.num_layers,
        built.config.num_single_layers,
    ) == (4, 4)
    assert torch.equal(FLUX.call(built.eval(), make_inputs()), FLUX.call(model, make_inputs()))


@pytest.mark.parametrize("name", SIZES)
def test_the_released_models_have_their_published_sizes(name):
    config, (parameters, doubles) = FLUX.model_configs[name], SIZES[name]
    sizes = {key: torch.Size(shape).numel() for key, shape in expected_shapes(FLUX, config).items()}
    prefixes = [FLUX.block_prefix(config, index) for index in range(FLUX.num_blocks(config))]
    blocks = [sum(n for key, n in sizes.items() if key.startswith(prefix)) for prefix in prefixes]
    assert sum(sizes.values()) == parameters
    assert blocks == [DOUBLE] * doubles + [SINGLE] * 38
    assert [len(section) for section in FLUX.sections(config)] == [doubles, 38]


def test_the_full_size_class_is_ours_block_for_block():
    from diffusers import FluxTransformer2DModel

    config = FLUX.model_configs["flux1_dev"]
    with torch.device("meta"):
        # else diffusers' defaults are the released model
        theirs = FluxTransformer2DModel(guidance_embeds=True)
    assert {n: tuple(t.shape) for n, t in theirs.state_dict().items()} == expected_shapes(
        FLUX, config
    )
    assert {
        name: theirs.config[name] if name != "axes_dims_rope" else list(theirs.config[name])
        for name in config
    } == config


@pytest.mark.parametrize(
    "config",
    [
        FLUX.model_configs["flux1_dev"],
        FLUX.model_configs["flux1_lite"],
        {**FLUX.tiny_config, **HEAD_32},
        {**FLUX.tiny_config, **HEAD_32, "guidance_embeds": False},
        {**FLUX.tiny_config, **HEAD_32, "out_channels": 8},
    ],
    ids=["dev", "lite", "tiny", "no guidance", "other output"],
)
def test_shapes_alone_give_the_configuration(config):
    shapes = expected_shapes(FLUX, config)
    assert FLUX.infer_config(lambda key: shapes[key], shapes) == config


@pytest.mark.parametrize("name", SIZES)
def test_names_are_total_both_ways(name):
    """Every tensor of diffusers has a place, every piece of ComfyUI's tensors is filled once, and
    back."""
    keys, pieces = list(expected_shapes(FLUX, FLUX.model_configs[name])), {}
    for key in keys:
        part = FLUX.to_comfyui(key)
        pieces.setdefault(part.name, []).extend(part.pieces)
        assert len(part.pieces) <= part.of and key in FLUX.from_comfyui(part.name)
    assert all(sorted(found) == list(range(len(found))) for found in pieces.values())
    assert sorted(key for name in pieces for key in FLUX.from_comfyui(name)) == sorted(keys)
    with pytest.raises(KeyError):
        FLUX.to_comfyui("transformer_blocks.0.attn.to_x.weight")
    assert FLUX.from_comfyui("double_blocks.0.other") == ("double_blocks.0.other",)


def test_comfyui_tensors_become_diffusers_as_diffusers_converts_them():
    """Against diffusers' own converter, which knows the released width alone: so each tensor has
    one column."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    config = {**FLUX.model_configs["flux1_dev"], "num_layers": 2, "num_single_layers": 2}
    generator = torch.Generator().manual_seed(0)
    columns = {
        k: torch.randn(s[0], generator=generator) for k, s in expected_shapes(FLUX, config).items()
    }
    sources = {k: Source(tuple(t.shape), lambda t=t: t) for k, t in columns.items()}
    stored = {name: source.read() for name, source in comfyui_sources(FLUX, sources).items()}
    assert all(
        tuple(stored[name].shape) == s.shape for name, s in comfyui_sources(FLUX, sources).items()
    )
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(stored))
    assert theirs.keys() == columns.keys() and all(
        torch.equal(theirs[k], t) for k, t in columns.items()
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_comfyui_file_is_read_as_the_model_itself(tmp_path, prefix):
    weights = check_comfyui_file(
        FLUX, make_model(**HEAD_32), make_inputs(**HEAD_32), tmp_path, prefix
    )
    assert weights.config == {**FLUX.tiny_config, **HEAD_32}


def test_other_models_with_double_and_single_blocks_are_not_taken_for_it(model):
    assert detect_architecture(model.state_dict(), "file") is FLUX
    assert detect_architecture(in_comfyui(model), "file") is FLUX
    chroma = [
        name for name in in_comfyui(model) if "_mod." not in name and "modulation" not in name
    ]
    with pytest.raises(ValueError, match="no known architecture .known: qwen_image, flux1."):
        detect_architecture(chroma, "file")
    qwen = architecture_named("qwen_image")
    assert not FLUX.detect(expected_shapes(qwen, qwen.tiny_config)) and not qwen.detect(
        model.state_dict()
    )


def test_the_last_text_is_not_used():
    used = [FLUX.used_streams(FLUX.tiny_config, index) for index in range(8)]
    assert used == [("image", "text")] * 7 + [("image",)]


def test_blocks_that_are_kept_give_the_configuration():
    kept = FLUX.with_blocks(FLUX.tiny_config, [0, 2, 3, 4, 7])
    assert (kept["num_layers"], kept["num_single_layers"]) == (3, 2)
    assert FLUX.with_blocks(FLUX.tiny_config, range(8)) == FLUX.tiny_config
