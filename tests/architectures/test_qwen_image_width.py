"""A width-pruned block against the method's formulas written out by hand."""

import pytest
import torch

from ppcl_engine.plan import parse_intervals, parse_sites

from .width_formulas import check_own_forward, check_seen, modulated, projected_ffn, projected_text


@pytest.fixture
def state(architecture, model, padded_inputs):
    return architecture.embed(model, padded_inputs())


def parts(block, state):
    """Modulations of both streams and joint attention of a plain block, by its formulas."""
    rotary, _ = state.extra
    image_mod = block.img_mod(state.conditioning).chunk(6, dim=-1)
    text_mod = block.txt_mod(state.conditioning).chunk(6, dim=-1)

    def attention(image, text):
        out = block.attn(
            hidden_states=image,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=state.text_mask,
            image_rotary_emb=rotary,
        )
        return out

    return image_mod, text_mod, attention


@pytest.mark.parametrize("kind", ["ffn_image", "ffn_text"])
@pytest.mark.parametrize("form", ["paper", "gated"])
def test_ffn_forms(architecture, model, state, kind, form):
    plain = model.transformer_blocks[2]
    block, linear = projected_ffn(architecture, plain, kind, form)

    image_mod, text_mod, attention = parts(plain, state)
    image, text = attention(
        modulated(state.image, *image_mod[:2]), modulated(state.text, *text_mod[:2])
    )
    streams = {
        "image": (state.image + image_mod[2][:, None] * image, image_mod, plain.img_mlp),
        "text": (state.text + text_mod[2][:, None] * text, text_mod, plain.txt_mlp),
    }
    ours = architecture.run_block(block, state)
    for name, (x, (_, _, _, shift, scale, gate), mlp) in streams.items():
        inner = modulated(x, shift, scale)
        if not kind.endswith(name):
            expected = x + gate[:, None] * mlp(inner)
        else:
            expected = x + linear(x) if form == "paper" else x + gate[:, None] * linear(inner)
        torch.testing.assert_close(getattr(ours, name), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [False, True])
def test_text_stream(architecture, model, state, steps):
    first, plain = model.transformer_blocks[1], model.transformer_blocks[2]
    source, block, linears = projected_text(architecture, first, plain, steps)

    after = architecture.run_block(source, state)
    assert torch.equal(after.image, architecture.run_block(first, state).image)
    _, text_mod, _ = parts(first, state)
    published = modulated(state.text, *text_mod[:2])
    torch.testing.assert_close(after.modulated_text, published, rtol=1e-5, atol=1e-5)

    ours = architecture.run_block(block, after)
    image_mod, _, attention = parts(plain, after)
    image, _ = attention(
        modulated(after.image, *image_mod[:2]), linears["map"](published) + published
    )
    x = after.image + image_mod[2][:, None] * image
    expected = x + image_mod[5][:, None] * plain.img_mlp(modulated(x, *image_mod[3:5]))
    torch.testing.assert_close(ours.image, expected, rtol=1e-5, atol=1e-5)
    stepped = linears["step"](after.text) + after.text if steps else after.text
    torch.testing.assert_close(ours.text, stepped, rtol=1e-5, atol=1e-5)


def test_what_a_block_is_seen_to_do(architecture, model, state):
    block = model.transformer_blocks[2]
    seen = check_seen(architecture, block, state)
    for stream, mod in (("image", block.img_mod), ("text", block.txt_mod)):
        gate = mod(state.conditioning).chunk(6, dim=-1)[5][:, None]
        expected = seen[f"{stream}_before_ffn"] + gate * seen[f"{stream}_ffn_output"]
        torch.testing.assert_close(seen[f"{stream}_after_ffn"], expected, rtol=1e-5, atol=1e-5)


def test_diffusers_own_forward_runs_a_whole_pruned_model(architecture, padded_inputs):
    """Several groups and forms at once."""
    sites = parse_sites("text:1-1 text:3-5 ffn_image:3 ffn_text:2")
    check_own_forward(architecture, padded_inputs, intervals=parse_intervals("3-4"), sites=sites)
