"""SD3.5's width-pruned blocks against the method's formulas written out by hand."""

import copy

import pytest
import torch
from torch import nn

from ppcl_engine.algorithms.distillation.trainable import share_cuts, twin
from ppcl_engine.models.layout import layout_of
from ppcl_engine.plan import PruningPlan, parse_intervals, parse_sites

from .width_formulas import (
    WIDTH,
    check_own_forward,
    check_seen,
    modulated,
    projected_ffn,
    projected_text,
)

pytestmark = pytest.mark.parametrize("architecture", ["sd35"], indirect=True)
DUAL, SINGLE, LAST = 1, 3, 5  # blocks of the tiny model


@pytest.fixture
def state(architecture, model, padded_inputs):
    return architecture.embed(model, padded_inputs())


def modulations(norm, state):
    """Six, nine of a block that attends twice; of the last block's text two, scale and shift."""
    values = norm.linear(nn.functional.silu(state.conditioning))
    return values.chunk(values.shape[-1] // WIDTH, dim=-1)


def modulated_text(block, state):
    values = modulations(block.norm1_context, state)
    return modulated(state.text, *(reversed(values) if len(values) == 2 else values[:2]))


def after_attention(block, state, text=None):
    """(image, text) behind a plain block's attention, which sees `text` in the place of the
    modulated text."""
    image_mod, text_mod = (modulations(norm, state) for norm in (block.norm1, block.norm1_context))
    seen = modulated_text(block, state) if text is None else text
    image, context = block.attn(modulated(state.image, *image_mod[:2]), encoder_hidden_states=seen)
    image = state.image + image_mod[2][:, None] * image
    if len(image_mod) == 9:
        image = image + image_mod[8][:, None] * block.attn2(modulated(state.image, *image_mod[6:8]))
    return image, state.text if len(text_mod) == 2 else state.text + text_mod[2][:, None] * context


def after_ffn(x, block, state, suffix=""):
    shift, scale, gate = modulations(getattr(block, f"norm1{suffix}"), state)[3:6]
    return x + gate[:, None] * getattr(block, f"ff{suffix}")(modulated(x, shift, scale))


def test_plain_blocks_are_these_formulas(architecture, model, state):
    for block in model.transformer_blocks:
        image, text = after_attention(block, state)
        ours = architecture.run_block(block, state)
        torch.testing.assert_close(ours.image, after_ffn(image, block, state), rtol=1e-5, atol=1e-5)
        expected = (
            text
            if block is model.transformer_blocks[LAST]
            else after_ffn(text, block, state, "_context")
        )
        torch.testing.assert_close(ours.text, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "index, kind",
    [
        (DUAL, "ffn_image"),
        (DUAL, "ffn_text"),
        (SINGLE, "ffn_image"),
        (SINGLE, "ffn_text"),
        (LAST, "ffn_image"),
    ],
)
@pytest.mark.parametrize("form", ["paper", "gated"])
def test_ffn_forms(architecture, model, state, index, kind, form):
    plain = model.transformer_blocks[index]
    block, linear = projected_ffn(architecture, plain, kind, form)

    ours, both = architecture.run_block(block, state), after_attention(plain, state)
    for name, x, suffix in zip(("image", "text"), both, ("", "_context"), strict=True):
        if name == "text" and index == LAST:
            expected = state.text
        elif not kind.endswith(name):
            expected = after_ffn(x, plain, state, suffix)
        else:
            shift, scale, gate = modulations(getattr(plain, f"norm1{suffix}"), state)[3:6]
            expected = (
                x + linear(x)
                if form == "paper"
                else x + gate[:, None] * linear(modulated(x, shift, scale))
            )
        torch.testing.assert_close(getattr(ours, name), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "index, steps", [(DUAL, False), (DUAL, True), (SINGLE, False), (SINGLE, True), (LAST, False)]
)
def test_text_stream(architecture, model, state, index, steps):
    first, plain = model.transformer_blocks[index - 1], model.transformer_blocks[index]
    source, block, linears = projected_text(architecture, first, plain, steps)

    after = architecture.run_block(source, state)
    assert torch.equal(after.image, architecture.run_block(first, state).image)
    published = modulated_text(first, state)
    torch.testing.assert_close(after.modulated_text, published, rtol=1e-5, atol=1e-5)

    ours = architecture.run_block(block, after)
    x, _ = after_attention(plain, after, linears["map"](published) + published)
    torch.testing.assert_close(ours.image, after_ffn(x, plain, after), rtol=1e-5, atol=1e-5)
    stepped = linears["step"](after.text) + after.text if steps else after.text
    torch.testing.assert_close(ours.text, stepped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [DUAL, SINGLE, LAST])
def test_what_a_block_is_seen_to_do(architecture, model, state, index):
    block = model.transformer_blocks[index]
    seen = check_seen(architecture, block, state)
    torch.testing.assert_close(
        seen["text_modulated"], modulated_text(block, state), rtol=1e-6, atol=1e-6
    )
    streams = {"image": ""} if index == LAST else {"image": "", "text": "_context"}
    parts = ("before_ffn", "ffn_input", "ffn_output", "after_ffn")
    assert set(seen) == {
        "text_modulated",
        *(f"{stream}_{part}" for stream in streams for part in parts),
    }
    for stream, suffix in streams.items():
        gate = modulations(getattr(block, f"norm1{suffix}"), state)[5][:, None]
        expected = seen[f"{stream}_before_ffn"] + gate * seen[f"{stream}_ffn_output"]
        torch.testing.assert_close(seen[f"{stream}_after_ffn"], expected, rtol=1e-5, atol=1e-5)


def test_diffusers_own_forward_runs_a_whole_pruned_model(architecture, padded_inputs):
    """Several groups, forms and kinds of block at once."""
    sites = parse_sites("text:1-2 text:4-5 ffn_image:1 ffn_text:3 ffn_image:5") + parse_sites(
        "ffn_image:0", "gated"
    )
    check_own_forward(architecture, padded_inputs, intervals=parse_intervals("1-2"), sites=sites)


def test_a_cut_modulation_shares_its_origins_tensor(architecture, model):
    """Gradients reach both ends of the whole modulation; nothing reads its middle, the FFN's."""
    origin = copy.deepcopy(model.transformer_blocks[DUAL]).requires_grad_(True)
    block = twin(origin)
    architecture.project_ffn(block, "ffn_image", "paper")
    share_cuts(block, dict(origin.named_parameters()), set(block.ff.parameters()))
    block.norm1.linear(torch.randn(3, WIDTH)).sum().backward()
    first, middle, second = origin.norm1.linear.weight.grad.chunk(3)
    assert (first != 0).all() and (second != 0).all() and (middle == 0).all()


@pytest.mark.parametrize(
    "parts, reason",
    [
        (
            {"intervals": parse_intervals("4-5")},
            r"^interval 4-5 holds blocks of two kinds \(0-4, 5-5\); end it where",
        ),
        (
            {"sites": parse_sites("ffn_text:5")},
            "^width site ffn_text:5: block 5 does not have this part; it has: text, ffn_image$",
        ),
    ],
)
def test_what_the_last_block_has_no_place_for_is_refused(architecture, parts, reason):
    config = dict(architecture.tiny_config)
    plan = PruningPlan(
        architecture=architecture.name, config=config, num_blocks=6, fingerprint="f", **parts
    )
    with pytest.raises(ValueError, match=reason):
        layout_of(plan, plan.everything())
