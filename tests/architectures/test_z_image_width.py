"""Z-Image's width-pruned blocks against the method's formulas written out by hand."""

import copy

import pytest
import torch

from ppcl_engine.models.surgery import projection_modules
from ppcl_engine.plan import WidthSite, parse_intervals

from .width_formulas import check_own_forward, randomised, saved_parameters

pytestmark = pytest.mark.parametrize("architecture", ["z_image"], indirect=True)
WIDTH, HIDDEN = 48, 128


@pytest.fixture
def state(architecture, model, padded_inputs):
    return architecture.embed(model, padded_inputs())


def parts_of(block, state):
    """(x behind attention, the FFN's modulated input, the FFN's gate), by diffusers' formulas"""
    mask, rotary = state.extra
    x = state.stream("joint")
    scale, gate, ffn_scale, ffn_gate = (
        chunk[:, None] for chunk in block.adaLN_modulation(state.conditioning).chunk(4, dim=1)
    )
    given = block.attention(
        block.attention_norm1(x) * (1 + scale), attention_mask=mask, freqs_cis=rotary
    )
    x = x + gate.tanh() * block.attention_norm2(given)
    return x, block.ffn_norm1(x) * (1 + ffn_scale), ffn_gate.tanh()


@pytest.mark.parametrize("form", ["paper", "gated"])
def test_a_projection_replaces_the_ffn_and_the_norm_behind_it(architecture, model, state, form):
    plain = model.layers[2]
    block = copy.deepcopy(plain)
    architecture.project_ffn(block, "ffn_joint", form)
    randomised(block, architecture, ("ffn_joint",))
    linear = projection_modules(architecture, block, "ffn_joint")["map"]
    ffn = 3 * WIDTH * HIDDEN + WIDTH - (WIDTH**2 + WIDTH)
    cut = 2 * WIDTH**2 + 2 * WIDTH + WIDTH  # half of the modulation, the norm in front
    assert saved_parameters(plain, block) == (ffn + cut if form == "paper" else ffn)

    x, inner, gate = parts_of(plain, state)
    expected = x + linear(x) if form == "paper" else x + gate * linear(inner)
    ours = architecture.run_block(block, state).stream("joint")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_what_a_block_is_seen_to_do(architecture, model, state):
    block = model.layers[2]
    after, seen = architecture.observe(block, state)
    assert torch.equal(after.image, architecture.run_block(block, state).image)
    names = ("ffn_input", "ffn_output", "before_ffn", "after_ffn")
    assert set(seen) == {f"joint_{name}" for name in names}
    x, inner, gate = parts_of(block, state)
    torch.testing.assert_close(seen["joint_before_ffn"], x)
    torch.testing.assert_close(seen["joint_ffn_input"], inner)
    ends = x + gate * seen["joint_ffn_output"]
    torch.testing.assert_close(seen["joint_after_ffn"], ends)
    assert torch.equal(seen["joint_after_ffn"], after.stream("joint"))
    assert not block._forward_hooks and not block.feed_forward._forward_pre_hooks


def test_diffusers_own_forward_runs_a_whole_pruned_model(architecture, padded_inputs):
    """Both forms, a student without correction and one with."""
    sites = tuple(
        WidthSite(block=block, kind="ffn_joint", form=form)
        for block, form in ((0, "paper"), (1, "gated"), (4, "paper"))
    )
    first, second = parse_intervals("1-2 4-5")
    corrected = type(second)(first=4, last=5, correction="affine")
    check_own_forward(architecture, padded_inputs, intervals=(first, corrected), sites=sites)
