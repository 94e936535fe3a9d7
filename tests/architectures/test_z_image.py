"""Z-Image against diffusers: the same forward bit for bit, the released model's sizes, and both
layouts' names."""

from functools import partial

import pytest
import torch
from torch import nn

from ppcl_engine.architectures import architecture_named, detect_architecture
from ppcl_engine.models.model_configs import check_model_config
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.surgery import Correction, add_correction
from ppcl_engine.models.weights import Weights, expected_shapes
from ppcl_engine.system.tensor_files import write_tensors

from ..tiny.models import check_comfyui_file, comfyui_state, tiny_inputs, tiny_model

Z_IMAGE = architecture_named("z_image")
FULL, TINY = Z_IMAGE.model_configs["z_image"], Z_IMAGE.tiny_config
make_inputs = partial(tiny_inputs, Z_IMAGE)


@pytest.fixture(scope="module")
def model():
    return tiny_model(Z_IMAGE)


def with_texts(inputs: dict, *lengths: int) -> dict:
    """Captions of these lengths, with noise as padding."""
    tokens = max(lengths)
    text = torch.randn(
        len(lengths),
        tokens,
        TINY["cap_feat_dim"],
        generator=torch.Generator().manual_seed(2),
    )
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    return {**inputs, "encoder_hidden_states": text, "encoder_hidden_states_mask": mask}


def blockwise(model, inputs):
    state = Z_IMAGE.embed(model, inputs)
    for block in model.layers:
        state = Z_IMAGE.run_block(block, state)
    return state, Z_IMAGE.finish(model, state)


@pytest.mark.parametrize("grid", [(1, 2, 3), (1, 4, 8)], ids=["padded", "32 tokens"])
@pytest.mark.parametrize("lengths", [(3, 5, 5, 5), (3, 40, 12, 33)], ids=["one length", "several"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_by_block_equals_diffusers(dtype, lengths, grid):
    model = tiny_model(Z_IMAGE).to(dtype)
    inputs = {
        name: t.to(dtype) if t.is_floating_point() and name != "timestep" else t
        for name, t in with_texts(make_inputs(grid=grid), *lengths).items()
    }
    with torch.no_grad():
        whole = Z_IMAGE.call(model, inputs)
        state, velocity = blockwise(model, inputs)
    assert torch.equal(velocity, whole) and whole.shape == inputs["hidden_states"].shape
    assert whole.std() > 0.1
    assert state.image.shape[1] == 32
    assert state.real("image").sum(1).tolist() == [grid[1] * grid[2]] * 4
    assert state.real("text").sum(1).tolist() == [32 if n <= 32 else 64 for n in lengths]
    assert torch.equal(state.stream("joint"), torch.cat([state.image, state.text], dim=1))


def test_the_velocity_points_from_the_picture_to_the_noise(model):
    """diffusers' model is given 1 - t, and its pipeline turns the result around."""
    inputs = make_inputs(grid=(1, 2, 3))
    pictures = Z_IMAGE.unpack(inputs["hidden_states"], inputs["grid"])
    theirs = model(
        [picture[:, None] for picture in pictures],
        1 - inputs["timestep"],
        list(inputs["encoder_hidden_states"]),
        return_dict=False,
    )[0]
    ours = Z_IMAGE.unpack(Z_IMAGE.call(model, inputs), inputs["grid"])
    assert torch.equal(ours, -torch.stack(theirs)[:, :, 0])


@pytest.mark.parametrize("name", ["timestep", "encoder_hidden_states", "hidden_states"])
def test_everything_that_is_given_is_read(model, name):
    inputs = make_inputs()
    other = {**inputs, name: inputs[name] + 0.1}
    assert not torch.equal(Z_IMAGE.call(model, inputs), Z_IMAGE.call(model, other))


def test_a_correction_knows_where_the_image_ends(model):
    """In diffusers' own forward too, which gives blocks one sequence."""
    config = dict(TINY)
    blocks = [Z_IMAGE.build_block(config, i) for i in range(Z_IMAGE.num_blocks(config))]
    correction = Correction(TINY["dim"], ("image", "text"), None)
    for n, parameter in enumerate(correction.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(n))
    add_correction(blocks[2], correction, Z_IMAGE.block_returns)
    built = Z_IMAGE.assemble(Z_IMAGE.build_outer(config), config, blocks).eval()
    built.load_state_dict(
        {
            **model.state_dict(),
            **{f"layers.2.correction.{n}": t for n, t in correction.state_dict().items()},
        }
    )
    inputs = with_texts(make_inputs(), 3, 40, 12, 33)
    with torch.no_grad():
        whole, (_, velocity) = Z_IMAGE.call(built, inputs), blockwise(built, inputs)
        state = Z_IMAGE.embed(built, inputs)
        plain, corrected = (Z_IMAGE.run_block(m.layers[2], state) for m in (model, built))
    assert torch.equal(whole, velocity) and not torch.equal(whole, Z_IMAGE.call(model, inputs))
    for stream in ("image", "text"):
        expected = correction.correct(stream, plain.stream(stream))
        torch.testing.assert_close(corrected.stream(stream), expected)


def test_the_released_model_has_its_published_size():
    shapes = expected_shapes(Z_IMAGE, FULL)
    sizes = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    blocks = [
        sum(n for key, n in sizes.items() if key.startswith(Z_IMAGE.block_prefix(FULL, index)))
        for index in range(30)
    ]
    assert blocks == [180_910_336] * 30
    assert sum(sizes.values()) - sum(blocks) == 727_598_656
    assert sum(sizes.values()) == 6_154_908_736
    assert Z_IMAGE.sections(FULL) == (range(30),)


def test_the_full_size_class_is_ours_block_for_block():
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):  # diffusers' defaults are the released model
        theirs = ZImageTransformer2DModel()
    shapes = {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
    assert shapes == expected_shapes(Z_IMAGE, FULL)


@pytest.mark.parametrize("config", [FULL, TINY], ids=["released", "tiny"])
def test_shapes_alone_give_the_configuration(config):
    shapes = expected_shapes(Z_IMAGE, config)
    assert Z_IMAGE.infer_config(lambda key: shapes[key], shapes) == config
    assert check_model_config("z_image", config, "file") is config


def test_names_are_total_both_ways():
    shapes = expected_shapes(Z_IMAGE, FULL)
    stored = {Z_IMAGE.to_comfyui(key, shapes).name for key in shapes}
    assert sorted(key for name in stored for key in Z_IMAGE.from_comfyui(name)) == sorted(shapes)
    assert {"layers.29.attention.qkv.weight", "noise_refiner.1.attention.out.weight"} <= stored
    assert {"final_layer.linear.bias", "x_embedder.weight", "layers.28.ffn_norm1.weight"} <= stored
    with pytest.raises(KeyError):
        Z_IMAGE.to_comfyui("layers.0.attention.to_x.weight", shapes)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_comfyui_file_is_read_as_the_model_itself(model, tmp_path, prefix):
    weights = check_comfyui_file(Z_IMAGE, model, make_inputs(), tmp_path, prefix)
    assert weights.config == TINY


def test_lumina_is_not_taken_for_it(model):
    assert detect_architecture(model.state_dict(), "file") is Z_IMAGE
    stored = comfyui_state(Z_IMAGE, model)
    assert detect_architecture(stored, "file") is Z_IMAGE
    with pytest.raises(ValueError, match="no known architecture"):
        detect_architecture([name for name in stored if "pad_token" not in name], "file")


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"axes_dims": [4, 6, 8]}, r"axes_dims \[4, 6, 8\] of 3 heads do not add up to dim 48"),
        ({"n_kv_heads": 1}, "n_kv_heads is 1, not n_heads 3"),
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim"),
        ({"all_patch_size": [2, 4]}, "all_patch_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_is_not_read_is_named(change, problem):
    with pytest.raises(ValueError, match=f"^file: configuration: .*{problem}|{problem}"):
        check_model_config("z_image", {**TINY, **change}, "file")


def test_the_last_text_is_not_used():
    used = [Z_IMAGE.used_streams(TINY, index) for index in range(6)]
    assert used == [("image", "text")] * 5 + [("image",)]


def test_blocks_that_are_kept_give_the_configuration():
    assert Z_IMAGE.with_blocks(TINY, [0, 2, 5]) == {**TINY, "n_layers": 3}


def test_a_norm_that_no_forward_reads_may_be_in_the_file(model, tmp_path):
    """The file that ComfyUI's makers publish has it."""
    path, state = tmp_path / "z_image.safetensors", comfyui_state(Z_IMAGE, model)
    write_tensors(path, {**state, "norm_final.weight": torch.ones(TINY["dim"])})
    assert not any("norm_final" in key for key in Weights(path).keys())
    inputs = make_inputs()
    with torch.no_grad():
        assert torch.equal(Z_IMAGE.call(open_model(path), inputs), Z_IMAGE.call(model, inputs))
