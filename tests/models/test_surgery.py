"""Blocks that are put into a model behave as diffusers' own, however they are called."""

import copy

import pytest
import torch

from ppcl_engine.models.layout import layout_of
from ppcl_engine.models.surgery import (
    Correction,
    PassThrough,
    add_correction,
    build_student,
    pruned_blocks,
)
from ppcl_engine.plan import Interval, PruningPlan

INTERVALS = (
    Interval(first=1, last=3, correction="affine"),
    Interval(first=4, last=5, correction="2"),
)


@pytest.fixture
def pruned(architecture, make_model):
    """A trainable tiny model with both forms of correction and three gaps."""
    model = make_model(seed=3)
    teacher, config = model.transformer_blocks, architecture.tiny_config
    torch.manual_seed(0)
    plan = PruningPlan(
        architecture=architecture.name,
        config=config,
        num_blocks=6,
        fingerprint="",
        intervals=INTERVALS,
    )
    layout = layout_of(plan, plan.everything())
    blocks = pruned_blocks(
        architecture,
        layout,
        lambda i, edit: edit(teacher[i]),
        lambda i: build_student(architecture, config, i),
    )
    return architecture.assemble(model, config, blocks).requires_grad_(True)


def test_one_module_a_teacher_index(architecture, pruned):
    blocks = list(pruned.transformer_blocks)
    assert len(blocks) == 6 and [
        i for i, b in enumerate(blocks) if not isinstance(b, PassThrough)
    ] == [0, 1, 4]
    assert all(isinstance(blocks[i], PassThrough) and not blocks[i].state_dict() for i in (2, 3, 5))
    assert type(blocks[1]) is type(blocks[0])
    assert not hasattr(blocks[0], "correction")
    assert set(blocks[1].correction.maps) == {"image", "text"}
    # nothing reads the text behind the last block
    assert set(blocks[4].correction.maps) == {"image"}
    assert [m.weight.shape for m in blocks[4].correction.maps["image"]] == [(2, 32), (32, 2)]


def test_called_positionally_and_by_keyword(architecture, pruned, padded_inputs):
    state = architecture.embed(pruned, padded_inputs())
    rotary, modulate_index = state.extra
    for index in (1, 2, 4):
        block = pruned.transformer_blocks[index]
        named = architecture.run_block(block, state)
        text, image = block(
            state.image,
            state.text,
            state.text_mask,
            state.conditioning,
            rotary,
            None,
            modulate_index,
        )
        assert torch.equal(image, named.image) and torch.equal(text, named.text)
    passed = architecture.run_block(pruned.transformer_blocks[2], state)
    assert passed.image is state.image and passed.text is state.text
    mixed = pruned.transformer_blocks[2](
        state.image, encoder_hidden_states=state.text, temb=state.conditioning
    )
    assert mixed[0] is state.text and mixed[1] is state.image


def test_gradient_checkpointing_changes_nothing(architecture, pruned, padded_inputs):
    inputs, gradients = padded_inputs(), []
    pruned.train()
    for checkpointing in (False, True):
        pruned.enable_gradient_checkpointing() if checkpointing else pruned.disable_gradient_checkpointing()
        pruned.zero_grad()
        velocity = architecture.call(pruned, inputs)
        velocity.square().mean().backward()
        gradients.append(
            {n: p.grad.clone() for n, p in pruned.named_parameters() if p.grad is not None}
            | {"": velocity}
        )
    assert pruned.is_gradient_checkpointing
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert "transformer_blocks.1.correction.maps.text.weight" in gradients[0]


def test_a_zero_correction_is_the_block_itself(architecture, model, padded_inputs):
    state, block = architecture.embed(model, padded_inputs()), model.transformer_blocks[2]
    correction = Correction(32, ("image", "text"))
    corrected = add_correction(copy.deepcopy(block), correction, architecture.block_returns)
    plain = architecture.run_block(block, state)
    same = architecture.run_block(corrected, state)
    assert torch.equal(same.image, plain.image) and torch.equal(same.text, plain.text)
    torch.nn.init.constant_(correction.maps["text"].bias, 2.0)
    moved = architecture.run_block(corrected, state)
    assert torch.equal(moved.image, plain.image) and torch.equal(moved.text, plain.text + 2)
