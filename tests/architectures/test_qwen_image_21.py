"""Qwen-Image 2.1 against diffusers: the same forward bit for bit, the released model's sizes, both
layouts' names, and the method's formulas for its FFN."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from ppcl_engine.architectures import REFERENCES, architecture_named, detect_architecture
from ppcl_engine.models.model_configs import check_model_config
from ppcl_engine.models.surgery import Correction, add_correction, projection_modules
from ppcl_engine.models.weights import expected_shapes
from ppcl_engine.plan import WidthSite, parse_intervals

from ..tiny.models import check_comfyui_file, comfyui_state, tiny_inputs, tiny_model
from .width_formulas import check_own_forward, randomised, saved_parameters

QWEN = architecture_named("qwen_image_21")
FULL, TINY = QWEN.model_configs["qwen_image_21"], QWEN.tiny_config
WIDTH = 64
make_inputs = partial(tiny_inputs, QWEN)


@pytest.fixture(scope="module")
def model():
    return tiny_model(QWEN)


def with_lengths(inputs: dict, *lengths: int) -> dict:
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    return {**inputs, "encoder_hidden_states_mask": mask}


def blockwise(model, inputs):
    state = QWEN.embed(model, inputs)
    for block in model.transformer_blocks:
        state = QWEN.run_block(block, state)
    return state, QWEN.finish(model, state)


@pytest.mark.parametrize("grid", [(1, 2, 4), (1, 6, 4)], ids=["wide", "high"])
@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (3, 5, 1, 2)], ids=["one length", "several"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_by_block_equals_diffusers(dtype, lengths, grid):
    model = tiny_model(QWEN).to(dtype)
    inputs = {
        name: t.to(dtype) if t.is_floating_point() and name != "timestep" else t
        for name, t in with_lengths(make_inputs(grid=grid), *lengths).items()
    }
    with torch.no_grad():
        whole = QWEN.call(model, inputs)
        state, velocity = blockwise(model, inputs)
    assert torch.equal(velocity, whole) and whole.shape == inputs["hidden_states"].shape
    assert whole.std() > 0.1
    assert torch.equal(state.stream("joint"), torch.cat([state.text, state.image], dim=1))
    assert state.real("text").sum(1).tolist() == list(lengths)


def test_padding_that_no_caption_needs_moves_nothing(model):
    """A caption alone is drawn as diffusers' pipeline draws it, which gives no padding."""
    inputs = with_lengths(make_inputs(), 3, 2, 3, 1)
    short = {
        **inputs,
        "encoder_hidden_states": inputs["encoder_hidden_states"][:, :3],
        "encoder_hidden_states_mask": inputs["encoder_hidden_states_mask"][:, :3],
    }
    assert torch.equal(QWEN.call(model, inputs), QWEN.call(model, short))
    assert QWEN.embed(model, inputs).text.shape[1] == 3


@pytest.mark.parametrize("name", ["timestep", "encoder_hidden_states", "hidden_states"])
def test_everything_that_is_given_is_read(model, name):
    inputs = make_inputs()
    other = {**inputs, name: inputs[name] + 0.1}
    assert not torch.equal(QWEN.call(model, inputs), QWEN.call(model, other))


def test_the_text_depends_on_neither_image_nor_time(model):
    inputs = make_inputs()
    noise = torch.randn(inputs["hidden_states"].shape)
    other = {**inputs, "timestep": inputs["timestep"] / 2, "hidden_states": noise}
    (ours, velocity), (theirs, changed) = (blockwise(model, given) for given in (inputs, other))
    assert torch.equal(ours.text, theirs.text) and not torch.equal(velocity, changed)


def test_a_correction_knows_where_the_image_is(model):
    """In diffusers' own forward too, which gives blocks one sequence."""
    blocks = [QWEN.build_block(TINY, i) for i in range(QWEN.num_blocks(TINY))]
    correction = Correction(WIDTH, ("image", "text"), None)
    for n, parameter in enumerate(correction.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(n))
    add_correction(blocks[2], correction, QWEN.block_returns)
    built = QWEN.assemble(QWEN.build_outer(TINY), TINY, blocks).eval()
    own = {f"transformer_blocks.2.correction.{n}": t for n, t in correction.state_dict().items()}
    built.load_state_dict({**model.state_dict(), **own})
    inputs = with_lengths(make_inputs(), 3, 5, 1, 2)
    with torch.no_grad():
        whole, (_, velocity) = QWEN.call(built, inputs), blockwise(built, inputs)
        state = QWEN.embed(built, inputs)
        plain, corrected = (QWEN.run_block(m.transformer_blocks[2], state) for m in (model, built))
    assert torch.equal(whole, velocity) and not torch.equal(whole, QWEN.call(model, inputs))
    for stream in ("image", "text"):
        expected = correction.correct(stream, plain.stream(stream))
        torch.testing.assert_close(corrected.stream(stream), expected)


def test_the_released_model_has_its_published_size():
    shapes = expected_shapes(QWEN, FULL)
    sizes = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    blocks = [
        sum(n for key, n in sizes.items() if key.startswith(QWEN.block_prefix(FULL, index)))
        for index in range(32)
    ]
    assert blocks == [218_104_064] * 32
    assert sum(sizes.values()) - sum(blocks) == 135_794_688
    assert sum(sizes.values()) == 7_115_124_736
    assert QWEN.sections(FULL) == (range(32),)


def test_the_full_size_class_is_ours_block_for_block():
    from diffusers import QwenImage21Transformer2DModel

    with torch.device("meta"):  # diffusers' defaults are the released model
        theirs = QwenImage21Transformer2DModel()
    shapes = {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
    assert shapes == expected_shapes(QWEN, FULL)
    left_out = {k: v for k, v in FULL.items() if k not in ("context_in_dim", "mlp_ratio")}
    assert shapes == expected_shapes(QWEN, left_out)  # as its config.json is published


@pytest.mark.parametrize("config", [FULL, TINY], ids=["released", "tiny"])
def test_shapes_alone_give_the_configuration(config):
    shapes = expected_shapes(QWEN, config)
    assert QWEN.infer_config(lambda key: shapes[key], shapes) == config
    assert check_model_config("qwen_image_21", config, "file") is config


def test_names_are_total_both_ways():
    shapes = expected_shapes(QWEN, FULL)
    stored = {QWEN.to_comfyui(key, shapes).name for key in shapes}
    assert sorted(key for name in stored for key in QWEN.from_comfyui(name)) == sorted(shapes)
    assert {"transformer_blocks.31.img_mlp.gate_up.weight", "modulation.1.weight"} <= stored
    assert len(shapes) - len(stored) == 32  # gate and up are one map there, the gate first
    gate, up = QWEN.from_comfyui("transformer_blocks.0.img_mlp.gate_up.weight")
    assert (gate.split(".")[3], up.split(".")[3]) == ("gate_layer", "proj")
    with pytest.raises(KeyError):
        QWEN.to_comfyui("transformer_blocks.0.attn.to_x.weight", shapes)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_comfyui_file_is_read_as_the_model_itself(model, tmp_path, prefix):
    weights = check_comfyui_file(QWEN, model, make_inputs(), tmp_path, prefix)
    assert weights.config == TINY


def test_it_is_told_from_qwen_image(model):
    older = architecture_named("qwen_image")
    for names in (model.state_dict(), comfyui_state(QWEN, model)):
        assert detect_architecture(names, "file") is QWEN
    assert detect_architecture(tiny_model(older).state_dict(), "file") is older


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"axes_dims_rope": [4, 14, 12]}, r"axes_dims_rope \[4, 14, 12\] do not add up to"),
        ({"patch_size": 2}, "patch_size"),
        ({"causal_condition": False}, "causal_condition"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_is_not_read_is_named(change, problem):
    with pytest.raises(ValueError, match=f"^file: configuration: .*{problem}|{problem}"):
        check_model_config("qwen_image_21", {**TINY, **change}, "file")


def test_latents_are_tokens(model):
    latents = torch.randn(2, 8, 4, 6)
    assert torch.equal(QWEN.unpack(QWEN.pack(latents), QWEN.grid(latents)), latents)
    assert QWEN.latent_shape(TINY, 64, 96) == (8, 4, 6)
    with pytest.raises(ValueError, match="48 x 64 pixels is not a multiple of 32"):
        QWEN.latent_shape(TINY, 48, 64)
    with pytest.raises(ValueError, match="latents of 3 x 6 cannot be packed"):
        QWEN.pack(latents[:, :, :3])


def test_condition_images_are_one_line(model):
    inputs = {**make_inputs(), REFERENCES: torch.randn(4, 8, 8)}
    for forward in (QWEN.call, QWEN.embed):
        with pytest.raises(ValueError, match="condition images are not supported; leave the ref"):
            forward(model, inputs)


def test_the_last_text_is_not_used():
    used = [QWEN.used_streams(TINY, index) for index in range(6)]
    assert used == [("image", "text")] * 5 + [("image",)]


def parts_of(block, state):
    """(x behind attention, the FFN's modulated input, the FFN's gate), by diffusers' formulas; text
    reads the last row of the modulation"""
    x, read = state.stream("joint"), state.extra
    drawn, rows = read["target_token_mask"][None, :, None], read["modulation"]
    scale, gate, ffn_scale, ffn_gate = torch.where(drawn, rows[:-1, None], rows[-1]).chunk(4, -1)
    kept = {name: read[name] for name in ("rotary_emb", "segments", "key_valid")}
    given = block.attn(hidden_states=block.img_norm1(x) * (1 + scale), **kept)
    x = x + gate.tanh() * given
    return x, block.img_norm2(x) * (1 + ffn_scale), ffn_gate.tanh()


@pytest.mark.parametrize("form", ["paper", "gated"])
def test_a_projection_replaces_the_ffn(model, form):
    plain = model.transformer_blocks[2]
    block = copy.deepcopy(plain)
    QWEN.project_ffn(block, "ffn_joint", form)
    randomised(block, QWEN, ("ffn_joint",))
    linear = projection_modules(QWEN, block, "ffn_joint")["map"]
    assert saved_parameters(plain, block) == 3 * 3 * WIDTH**2 - (WIDTH**2 + WIDTH)

    state = QWEN.embed(model, with_lengths(make_inputs(), 3, 5, 1, 2))
    x, inner, gate = parts_of(plain, state)
    expected = x + linear(x) if form == "paper" else x + gate * linear(inner)
    ours = QWEN.run_block(block, state).stream("joint")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_what_a_block_is_seen_to_do(model):
    block, state = model.transformer_blocks[2], QWEN.embed(model, make_inputs())
    after, seen = QWEN.observe(block, state)
    names = ("ffn_input", "ffn_output", "before_ffn", "after_ffn")
    assert set(seen) == {f"joint_{name}" for name in names}
    x, inner, gate = parts_of(block, state)
    torch.testing.assert_close(seen["joint_before_ffn"], x)
    torch.testing.assert_close(seen["joint_ffn_input"], inner)
    torch.testing.assert_close(seen["joint_after_ffn"], x + gate * seen["joint_ffn_output"])
    assert torch.equal(seen["joint_after_ffn"], after.stream("joint"))
    assert not block._forward_hooks and not block.img_mlp._forward_pre_hooks


@pytest.mark.parametrize("architecture", ["qwen_image_21"], indirect=True)
def test_diffusers_own_forward_runs_a_whole_pruned_model(architecture, padded_inputs):
    """Both forms, a student without correction and one with; pass-through blocks in the gaps."""
    sites = tuple(
        WidthSite(block=block, kind="ffn_joint", form=form)
        for block, form in ((0, "paper"), (3, "gated"), (4, "paper"))
    )
    first, second = parse_intervals("1-2 4-5")
    corrected = type(second)(first=4, last=5, correction="affine")
    check_own_forward(architecture, padded_inputs, intervals=(first, corrected), sites=sites)
