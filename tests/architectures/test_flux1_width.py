"""FLUX.1's width-pruned blocks, double and single, against the method's formulas written out by
hand."""

import copy

import pytest
import torch
from torch import nn

from ppcl_engine.algorithms.distillation.trainable import share_cuts, twin
from ppcl_engine.models.surgery import projection_modules
from ppcl_engine.plan import parse_intervals, parse_sites

from .width_formulas import (
    WIDTH,
    check_own_forward,
    check_seen,
    modulated,
    projected_ffn,
    projected_text,
    randomised,
    saved_parameters,
)

pytestmark = pytest.mark.parametrize("architecture", ["flux1"], indirect=True)
TEXT_TOKENS = 5


@pytest.fixture
def state(architecture, model, padded_inputs):
    return architecture.embed(model, padded_inputs(text_tokens=TEXT_TOKENS))


def modulations(norm, state, parts):
    return norm.linear(nn.functional.silu(state.conditioning)).chunk(parts, dim=-1)


def after_attention(block, state, text=None):
    """(image, text) behind a plain double block's attention, which sees `text` in the place of the
    modulated text."""
    image_mod, text_mod = (
        modulations(norm, state, 6) for norm in (block.norm1, block.norm1_context)
    )
    seen = modulated(state.text, *text_mod[:2]) if text is None else text
    image, context = block.attn(
        hidden_states=modulated(state.image, *image_mod[:2]),
        encoder_hidden_states=seen,
        image_rotary_emb=state.extra,
    )
    return state.image + image_mod[2][:, None] * image, state.text + text_mod[2][:, None] * context


def after_ffn(x, block, state, suffix=""):
    *_, shift, scale, gate = modulations(getattr(block, f"norm1{suffix}"), state, 6)
    return x + gate[:, None] * getattr(block, f"ff{suffix}")(modulated(x, shift, scale))


@pytest.mark.parametrize("kind", ["ffn_image", "ffn_text"])
@pytest.mark.parametrize("form", ["paper", "gated"])
def test_ffns_of_a_double_block(architecture, model, state, kind, form):
    plain = model.transformer_blocks[2]
    block, linear = projected_ffn(architecture, plain, kind, form)

    ours, both = architecture.run_block(block, state), after_attention(plain, state)
    for name, x, suffix in zip(("image", "text"), both, ("", "_context"), strict=True):
        *_, shift, scale, gate = modulations(getattr(plain, f"norm1{suffix}"), state, 6)
        if not kind.endswith(name):
            expected = after_ffn(x, plain, state, suffix)
        else:
            expected = (
                x + linear(x)
                if form == "paper"
                else x + gate[:, None] * linear(modulated(x, shift, scale))
            )
        torch.testing.assert_close(getattr(ours, name), expected, rtol=1e-5, atol=1e-5)


def test_ffn_of_a_single_block(architecture, model, state):
    """P(x) in place of `proj_mlp` and of its columns of `proj_out`; attention's columns and the
    gate stay."""
    plain = model.single_transformer_blocks[1]
    block = copy.deepcopy(plain)
    architecture.project_ffn(block, "ffn_joint", "gated")
    randomised(block, architecture, ("ffn_joint",))
    linear = projection_modules(architecture, block, "ffn_joint")["map"]
    assert saved_parameters(plain, block) == 7 * WIDTH**2 + 3 * WIDTH

    x = state.stream("joint")
    assert torch.equal(x[:, :TEXT_TOKENS], state.text)
    shift, scale, gate = modulations(plain.norm, state, 3)
    inner = modulated(x, shift, scale)
    attention = (
        plain.attn(hidden_states=inner, image_rotary_emb=state.extra)
        @ plain.proj_out.weight[:, :WIDTH].T
    )
    expected = x + gate[:, None] * (attention + plain.proj_out.bias + linear(inner))
    ours = architecture.run_block(block, state)
    torch.testing.assert_close(ours.stream("joint"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [False, True])
def test_text_stream(architecture, model, state, steps):
    first, plain = model.transformer_blocks[1], model.transformer_blocks[2]
    source, block, linears = projected_text(architecture, first, plain, steps)

    after = architecture.run_block(source, state)
    assert torch.equal(after.image, architecture.run_block(first, state).image)
    published = modulated(state.text, *modulations(first.norm1_context, state, 6)[:2])
    torch.testing.assert_close(after.modulated_text, published, rtol=1e-5, atol=1e-5)

    ours = architecture.run_block(block, after)
    x, _ = after_attention(plain, after, linears["map"](published) + published)
    torch.testing.assert_close(ours.image, after_ffn(x, plain, after), rtol=1e-5, atol=1e-5)
    stepped = linears["step"](after.text) + after.text if steps else after.text
    torch.testing.assert_close(ours.text, stepped, rtol=1e-5, atol=1e-5)


def test_what_a_double_block_is_seen_to_do(architecture, model, state):
    block = model.transformer_blocks[2]
    seen = check_seen(architecture, block, state)
    assert torch.equal(
        seen["text_modulated"],
        modulated(state.text, *modulations(block.norm1_context, state, 6)[:2]),
    )
    for stream, norm in (("image", block.norm1), ("text", block.norm1_context)):
        gate = modulations(norm, state, 6)[5][:, None]
        expected = seen[f"{stream}_before_ffn"] + gate * seen[f"{stream}_ffn_output"]
        torch.testing.assert_close(seen[f"{stream}_after_ffn"], expected, rtol=1e-5, atol=1e-5)


def test_what_a_single_block_is_seen_to_do(architecture, model, state):
    block = model.single_transformer_blocks[1]
    after, seen = architecture.observe(block, state)
    assert torch.equal(after.image, architecture.run_block(block, state).image)
    assert set(seen) == {
        f"joint_{name}" for name in ("ffn_input", "ffn_output", "before_ffn", "after_ffn")
    }
    inner = modulated(state.stream("joint"), *modulations(block.norm, state, 3)[:2])
    assert torch.equal(seen["joint_ffn_input"], inner) and torch.equal(
        seen["joint_after_ffn"], after.stream("joint")
    )
    columns = block.proj_out.weight[:, WIDTH:]
    given = nn.functional.gelu(block.proj_mlp(inner), approximate="tanh") @ columns.T
    torch.testing.assert_close(seen["joint_ffn_output"], given, rtol=1e-5, atol=1e-5)
    without = copy.deepcopy(block)
    without.proj_out.weight[:, WIDTH:] = 0
    expected = architecture.run_block(without, state).stream("joint")
    torch.testing.assert_close(seen["joint_before_ffn"], expected, rtol=1e-5, atol=1e-5)


def test_diffusers_own_forward_runs_a_whole_pruned_model(architecture, padded_inputs):
    """Several groups, forms and kinds of block at once."""
    sites = parse_sites("text:1-3 ffn_image:0 ffn_text:0 ffn_joint:4 ffn_joint:6")
    check_own_forward(
        architecture, padded_inputs, intervals=parse_intervals("2-3 4-5"), sites=sites
    )


def test_a_cut_map_shares_its_origins_tensor(architecture, model):
    """Gradients reach the whole map behind the columns that are left."""
    origin = copy.deepcopy(model.single_transformer_blocks[1]).requires_grad_(True)
    block = twin(origin)
    architecture.project_ffn(block, "ffn_joint", "gated")
    share_cuts(block, dict(origin.named_parameters()), set(block.proj_mlp.parameters()))
    joined = torch.randn(3, 2 * WIDTH)
    block.proj_out(joined).sum().backward()
    gradient = origin.proj_out.weight.grad
    assert (gradient[:, :WIDTH] != 0).all() and (gradient[:, WIDTH:] == 0).all()
