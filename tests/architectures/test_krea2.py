"""Krea 2 against diffusers: the same forward bit for bit, the released model's sizes, both layouts'
names, and the method's formulas for its FFN."""

import copy
from functools import partial

import pytest
import torch
from diffusers import Krea2Transformer2DModel
from diffusers.models.transformers.transformer_krea2 import Krea2RMSNorm
from torch import nn

from ppcl_engine.architectures import REFERENCES, architecture_named, detect_architecture
from ppcl_engine.models.model_configs import check_model_config
from ppcl_engine.models.surgery import Correction, add_correction, projection_modules
from ppcl_engine.models.weights import expected_shapes
from ppcl_engine.plan import WidthSite, parse_intervals

from ..tiny.models import check_comfyui_file, comfyui_state, tiny_inputs, tiny_model
from .width_formulas import check_own_forward, randomised, saved_parameters

KREA = architecture_named("krea2")
FULL, TINY = KREA.model_configs["krea2"], KREA.tiny_config
WIDTH, HIDDEN = 64, 256
LENGTHS = (3, 5, 1, 2)
make_inputs = partial(tiny_inputs, KREA)


@pytest.fixture(scope="module")
def model():
    return tiny_model(KREA)


def with_lengths(inputs: dict, *lengths: int) -> dict:
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    return {**inputs, "encoder_hidden_states_mask": mask}


def blockwise(model, inputs):
    state = KREA.embed(model, inputs)
    for block in model.transformer_blocks:
        state = KREA.run_block(block, state)
    return state, KREA.finish(model, state)


def built(*edited: nn.Module):
    """The model of our parts; `edited` blocks first."""
    blocks = [*edited, *(KREA.build_block(TINY, i) for i in range(len(edited), 6))]
    return KREA.assemble(KREA.build_outer(TINY), TINY, blocks).eval().requires_grad_(False)


def places(grid: tuple) -> torch.Tensor:
    """Places of five text tokens, then the image's, as diffusers' pipeline makes them."""
    from diffusers import Krea2Pipeline

    return Krea2Pipeline.prepare_position_ids(5, *grid[1:], device=torch.device("cpu"))


@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), LENGTHS], ids=["one length", "several"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_by_block_equals_diffusers(model, dtype, lengths):
    """As diffusers' loader makes it, which leaves the scales of norms in float32."""
    stock = Krea2Transformer2DModel(**TINY).to(dtype).requires_grad_(False)
    ours = built().to(dtype)
    rounded = {name: t.bfloat16() for name, t in model.state_dict().items()}
    stock.load_state_dict(rounded), ours.load_state_dict(rounded)
    for norm in stock.modules():
        if type(norm) is Krea2RMSNorm:
            norm.float()
    given = with_lengths(make_inputs(), *lengths)
    inputs = {
        name: t.to(dtype) if t.is_floating_point() and name != "timestep" else t
        for name, t in given.items()
    }
    with torch.no_grad():
        theirs = stock(
            hidden_states=inputs["hidden_states"],
            encoder_hidden_states=inputs["encoder_hidden_states"].unflatten(-1, (3, 8)),
            timestep=inputs["timestep"],
            position_ids=places((1, 2, 3)),
            encoder_attention_mask=inputs["encoder_hidden_states_mask"],
        ).sample
        whole = KREA.call(ours, inputs)
        state, velocity = blockwise(ours, inputs)
    assert torch.equal(velocity, whole) and torch.equal(whole, theirs)
    assert whole.std() > 0.1
    assert torch.equal(state.stream("joint"), torch.cat([state.text, state.image], dim=1))
    assert state.real("text").sum(1).tolist() == list(lengths)


def test_padding_moves_nothing(model):
    inputs = with_lengths(make_inputs(), *LENGTHS)
    text, mask = (inputs[name] for name in KREA.caption_inputs)
    other = {**inputs, "encoder_hidden_states": torch.where(mask[..., None], text, 7.0)}
    one = {**inputs, "encoder_hidden_states": text[:, :3]}
    short = {**one, "encoder_hidden_states_mask": mask[:, :3]}
    assert torch.equal(KREA.call(model, inputs), KREA.call(model, other))
    third = [KREA.call(model, given)[2] for given in (inputs, short)]
    torch.testing.assert_close(*third)


@pytest.mark.parametrize("name", ["timestep", "encoder_hidden_states", "hidden_states"])
def test_everything_that_is_given_is_read(model, name):
    inputs = make_inputs()
    other = {**inputs, name: inputs[name] + 0.1}
    assert not torch.equal(KREA.call(model, inputs), KREA.call(model, other))


def test_a_correction_knows_where_the_image_is(model):
    """In diffusers' own forward too, which gives blocks one sequence."""
    block = KREA.build_block(TINY, 0)
    correction = Correction(WIDTH, ("image", "text"), None)
    for n, parameter in enumerate(correction.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(n))
    edited = built(add_correction(block, correction, KREA.block_returns))
    own = {f"transformer_blocks.0.correction.{n}": t for n, t in correction.state_dict().items()}
    edited.load_state_dict({**model.state_dict(), **own})
    inputs = with_lengths(make_inputs(), *LENGTHS)
    with torch.no_grad():
        whole, (_, velocity) = KREA.call(edited, inputs), blockwise(edited, inputs)
        state = KREA.embed(edited, inputs)
        plain, corrected = (KREA.run_block(m.transformer_blocks[0], state) for m in (model, edited))
    assert torch.equal(whole, velocity) and not torch.equal(whole, KREA.call(model, inputs))
    for stream in ("image", "text"):
        expected = correction.correct(stream, plain.stream(stream))
        torch.testing.assert_close(corrected.stream(stream), expected)


def test_the_released_model_has_its_published_size():
    shapes = expected_shapes(KREA, FULL)
    sizes = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    blocks = [
        sum(n for key, n in sizes.items() if key.startswith(KREA.block_prefix(FULL, index)))
        for index in range(28)
    ]
    assert blocks == [434_159_872] * 28
    assert sum(sizes.values()) - sum(blocks) == 663_596_620
    assert sum(sizes.values()) == 12_820_073_036 and len(shapes) == 430
    assert KREA.sections(FULL) == (range(28),)


def test_the_full_size_class_is_ours_block_for_block():
    with torch.device("meta"):  # diffusers' defaults are the released model
        theirs = Krea2Transformer2DModel()
    shapes = {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
    assert shapes == expected_shapes(KREA, FULL)


@pytest.mark.parametrize("config", [FULL, TINY], ids=["released", "tiny"])
def test_shapes_alone_give_the_configuration(config):
    shapes = expected_shapes(KREA, config)
    assert KREA.infer_config(lambda key: shapes[key], shapes) == config
    assert check_model_config("krea2", config, "file") is config


def test_names_are_total_both_ways():
    shapes = expected_shapes(KREA, FULL)
    parts = {key: KREA.to_comfyui(key, shapes) for key in shapes}
    stored = {part.name for part in parts.values()}
    assert sorted(key for name in stored for key in KREA.from_comfyui(name)) == sorted(shapes)
    assert len(stored) == len(shapes)
    assert {"blocks.27.attn.wo.weight", "txtfusion.refiner_blocks.1.prenorm.scale"} <= stored
    assert {"txtmlp.0.scale", "tmlp.2.bias", "last.modulation.lin", "tproj.1.weight"} <= stored
    table = parts["transformer_blocks.3.scale_shift_table"]
    assert (table.name, table.whole((6, 6144))) == ("blocks.3.mod.lin", (36864,))
    assert table.shape((36864,)) == (6, 6144)
    with pytest.raises(KeyError):
        KREA.to_comfyui("transformer_blocks.0.attn.to_x.weight", shapes)


def test_a_comfyui_file_is_read_as_the_model_itself(model, tmp_path):
    weights = check_comfyui_file(KREA, model, make_inputs(), tmp_path, "model.diffusion_model.")
    assert weights.config == TINY
    assert weights.stored("transformer_blocks.0.scale_shift_table").shape == (6, WIDTH)


def test_it_is_detected_in_both_layouts(model):
    for names in (model.state_dict(), comfyui_state(KREA, model)):
        assert detect_architecture(names, "file") is KREA


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"axes_dims_rope": [4, 6, 8]}, r"axes_dims_rope \[4, 6, 8\] do not add up to"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_"),
        ({"text_num_key_value_heads": 2, "text_num_attention_heads": 5}, "text_num_attention_he"),
        ({"text_hidden_dim": 9}, "text_hidden_dim 9 is not a multiple"),
        ({"timestep_embed_dim": 31}, "timestep_embed_dim"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_is_not_read_is_named(change, problem):
    with pytest.raises(ValueError, match=f"^file: configuration: .*{problem}|{problem}"):
        check_model_config("krea2", {**TINY, **change}, "file")


def test_reference_pictures_are_one_line(model):
    inputs = {**make_inputs(), REFERENCES: torch.randn(4, 8, 16)}
    for forward in (KREA.call, KREA.embed):
        with pytest.raises(ValueError, match="reference pictures are not supported; leave them"):
            forward(model, inputs)


def test_the_last_text_is_not_used():
    used = [KREA.used_streams(TINY, index) for index in range(6)]
    assert used == [("image", "text")] * 5 + [("image",)]


def parts_of(block, state):
    """(x behind attention, the FFN's modulated input, the FFN's gate), by diffusers' formulas"""
    shared, rotary, mask = state.extra
    x, modulation = state.stream("joint"), shared.unflatten(-1, (6, -1)) + block.scale_shift_table
    scale, shift, gate, ffn_scale, ffn_shift, ffn_gate = modulation.unbind(-2)
    given = block.norm1(x) * (1 + scale) + shift
    x = x + gate * block.attn(given, attention_mask=mask, image_rotary_emb=rotary)
    return x, block.norm2(x) * (1 + ffn_scale) + ffn_shift, ffn_gate


@pytest.mark.parametrize("form", ["paper", "gated"])
def test_a_projection_replaces_the_ffn(model, form):
    plain = model.transformer_blocks[2]
    block = copy.deepcopy(plain)
    KREA.project_ffn(block, "ffn_joint", form)
    block = copy.deepcopy(block)  # a projected block is copied too
    randomised(block, KREA, ("ffn_joint",))
    linear = projection_modules(KREA, block, "ffn_joint")["map"]
    saved = 3 * HIDDEN * WIDTH - (WIDTH**2 + WIDTH)
    assert saved_parameters(plain, block) == saved + (WIDTH if form == "paper" else 0)

    state = KREA.embed(model, with_lengths(make_inputs(), *LENGTHS))
    x, inner, gate = parts_of(plain, state)
    expected = x + linear(x) if form == "paper" else x + gate * linear(inner)
    ours = KREA.run_block(block, state).stream("joint")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_what_a_block_is_seen_to_do(model):
    block, state = model.transformer_blocks[2], KREA.embed(model, make_inputs())
    after, seen = KREA.observe(block, state)
    names = ("ffn_input", "ffn_output", "before_ffn", "after_ffn")
    assert set(seen) == {f"joint_{name}" for name in names}
    x, inner, gate = parts_of(block, state)
    torch.testing.assert_close(seen["joint_before_ffn"], x)
    torch.testing.assert_close(seen["joint_ffn_input"], inner)
    torch.testing.assert_close(seen["joint_after_ffn"], x + gate * seen["joint_ffn_output"])
    assert torch.equal(seen["joint_after_ffn"], after.stream("joint"))
    assert not block._forward_hooks and not block.ff._forward_pre_hooks


@pytest.mark.parametrize("architecture", ["krea2"], indirect=True)
def test_diffusers_own_forward_runs_a_whole_pruned_model(architecture, padded_inputs):
    """Both forms, a student without correction and one with; pass-through blocks in the gaps."""
    sites = tuple(
        WidthSite(block=block, kind="ffn_joint", form=form)
        for block, form in ((0, "paper"), (3, "gated"), (4, "paper"))
    )
    first, second = parse_intervals("1-2 4-5")
    corrected = type(second)(first=4, last=5, correction="affine")
    check_own_forward(architecture, padded_inputs, intervals=(first, corrected), sites=sites)
