"""A width-pruned block against the method's formulas written out by hand."""

import copy

import pytest
import torch
from torch import nn

from ppcl_engine.architectures import SharedText
from ppcl_engine.bundle import empty_model
from ppcl_engine.layout import layout_of
from ppcl_engine.plan import PruningPlan, parse_intervals, parse_sites
from ppcl_engine.surgery import projection_modules

WIDTH = 32


@pytest.fixture
def state(architecture, model, padded_inputs):
    return architecture.embed(model, padded_inputs())


def randomised(block: nn.Module, architecture, kinds: tuple[str, ...]) -> nn.Module:
    torch.manual_seed(7)
    for kind in kinds:
        for linear in projection_modules(architecture, block, kind).values():
            nn.init.normal_(linear.weight, std=WIDTH**-0.5), nn.init.normal_(linear.bias)
    return block


def parts(block, state):
    """Modulated streams, joint attention and gates of a plain block, by its formulas."""
    rotary, _ = state.extra
    image_mod = block.img_mod(state.conditioning).chunk(6, dim=-1)
    text_mod = block.txt_mod(state.conditioning).chunk(6, dim=-1)

    def modulated(x, shift, scale):
        return nn.functional.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def attention(image, text):
        out = block.attn(hidden_states=image, encoder_hidden_states=text,
                         encoder_hidden_states_mask=state.text_mask, image_rotary_emb=rotary)  # fmt: skip
        return out

    return image_mod, text_mod, modulated, attention


@pytest.mark.parametrize("kind", ["ffn_image", "ffn_text"])
@pytest.mark.parametrize("form", ["paper", "gated"])
def test_ffn_forms(architecture, model, state, kind, form):
    plain = model.transformer_blocks[2]
    block = copy.deepcopy(plain)
    architecture.project_ffn(block, kind, form)
    randomised(block, architecture, (kind,))
    linear = projection_modules(architecture, block, kind)["map"]
    saved = sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in block.parameters())
    biases = 4 * WIDTH + (3 * WIDTH if form == "paper" else 0)  # of the FFN's first map, of half a modulation
    assert saved == (10 if form == "paper" else 7) * WIDTH**2 + biases

    image_mod, text_mod, modulated, attention = parts(plain, state)
    image, text = attention(modulated(state.image, *image_mod[:2]), modulated(state.text, *text_mod[:2]))
    streams = {"image": (state.image + image_mod[2][:, None] * image, image_mod, plain.img_mlp),
               "text": (state.text + text_mod[2][:, None] * text, text_mod, plain.txt_mlp)}  # fmt: skip
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
    source, shared = copy.deepcopy(first), SharedText()
    architecture.publish_text(source, shared)
    block = copy.deepcopy(plain)
    architecture.project_text(block, shared, steps)
    randomised(block, architecture, ("text",))
    linears = projection_modules(architecture, block, "text")
    assert set(linears) == ({"map", "step"} if steps else {"map"})

    after = architecture.run_block(source, state)
    assert torch.equal(after.image, architecture.run_block(first, state).image)
    _, text_mod, modulated, _ = parts(first, state)
    published = modulated(state.text, *text_mod[:2])
    torch.testing.assert_close(after.modulated_text, published, rtol=1e-5, atol=1e-5)

    ours = architecture.run_block(block, after)
    image_mod, _, modulated, attention = parts(plain, after)
    image, _ = attention(modulated(after.image, *image_mod[:2]), linears["map"](published) + published)
    x = after.image + image_mod[2][:, None] * image
    expected = x + image_mod[5][:, None] * plain.img_mlp(modulated(x, *image_mod[3:5]))
    torch.testing.assert_close(ours.image, expected, rtol=1e-5, atol=1e-5)
    stepped = linears["step"](after.text) + after.text if steps else after.text
    torch.testing.assert_close(ours.text, stepped, rtol=1e-5, atol=1e-5)


def test_what_a_block_is_seen_to_do(architecture, model, state):
    block = model.transformer_blocks[2]
    after, seen = architecture.observe(block, state)
    plain = architecture.run_block(block, state)
    assert torch.equal(after.image, plain.image) and torch.equal(after.text, plain.text)
    assert not block._forward_hooks and not block.attn.add_q_proj._forward_pre_hooks
    for stream, mod in (("image", block.img_mod), ("text", block.txt_mod)):
        gate = mod(state.conditioning).chunk(6, dim=-1)[5][:, None]
        expected = seen[f"{stream}_before_ffn"] + gate * seen[f"{stream}_ffn_output"]
        torch.testing.assert_close(seen[f"{stream}_after_ffn"], expected, rtol=1e-5, atol=1e-5)


def test_diffusers_own_forward_runs_a_whole_pruned_model(architecture, model, padded_inputs):
    """Several groups and forms at once; block by block with states, and by the model's forward: the same bits."""
    config = dict(architecture.tiny_config)
    plan = PruningPlan(architecture=architecture.name, config=config, num_blocks=6, fingerprint="f",
                       intervals=parse_intervals("3-4"), sites=parse_sites("text:1-1 text:3-5 ffn_image:3 ffn_text:2"))  # fmt: skip
    layout = layout_of(plan, plan.everything())
    pruned = empty_model(architecture, config, layout)
    torch.manual_seed(3)
    state_dict = {name: 0.1 * torch.randn(t.shape) for name, t in pruned.state_dict().items()}
    pruned.load_state_dict(state_dict, assign=True)
    inputs = padded_inputs()
    with torch.no_grad():
        whole = architecture.call(pruned, inputs)
        other = architecture.call(pruned, padded_inputs(seed=1))  # leaves its own text with the groups
        state = architecture.embed(pruned, inputs)
        for block in pruned.transformer_blocks:
            state = architecture.run_block(block, state)
        assert torch.equal(architecture.finish(pruned, state), whole)
        assert torch.equal(architecture.call(pruned, inputs), whole) and not torch.equal(whole, other)
