"""What the width tests of all architectures share: projected copies of a tiny model's blocks, and
the whole forward."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ppcl_engine.architectures import Architecture, BlockState, SharedText
from ppcl_engine.models.assembly import empty_model
from ppcl_engine.models.layout import layout_of
from ppcl_engine.models.surgery import projection_modules
from ppcl_engine.plan import PruningPlan

WIDTH = 32  # of the tiny models


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def randomised(block: nn.Module, architecture: Architecture, kinds: tuple[str, ...]) -> nn.Module:
    torch.manual_seed(7)
    for kind in kinds:
        for linear in projection_modules(architecture, block, kind).values():
            nn.init.normal_(linear.weight, std=WIDTH**-0.5), nn.init.normal_(linear.bias)
    return block


def saved_parameters(plain: nn.Module, block: nn.Module) -> int:
    return sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in block.parameters())


def projected_ffn(
    architecture: Architecture, plain: nn.Module, kind: str, form: str
) -> tuple[nn.Module, nn.Linear]:
    """(copy with a random projection in place of its FFN, that projection); what it saves is an FFN
    of 4 d, and the modulation in front of it in the paper's form."""
    block = copy.deepcopy(plain)
    architecture.project_ffn(block, kind, form)
    randomised(block, architecture, (kind,))
    assert saved_parameters(plain, block) == (
        (10 if form == "paper" else 7) * WIDTH**2 + (7 if form == "paper" else 4) * WIDTH
    )
    return block, projection_modules(architecture, block, kind)["map"]


def projected_text(
    architecture: Architecture, first: nn.Module, plain: nn.Module, steps: bool
) -> tuple[nn.Module, nn.Module, dict[str, nn.Linear]]:
    """(copy of `first` that publishes its text, copy of `plain` that reads it by random
    projections, these)."""
    source, block, shared = copy.deepcopy(first), copy.deepcopy(plain), SharedText()
    architecture.publish_text(source, shared)
    architecture.project_text(block, shared, steps)
    randomised(block, architecture, ("text",))
    linears = projection_modules(architecture, block, "text")
    assert set(linears) == ({"map", "step"} if steps else {"map"})
    return source, block, linears


def check_seen(
    architecture: Architecture, block: nn.Module, state: BlockState
) -> dict[str, torch.Tensor]:
    """Watching a block changes nothing and leaves nothing behind; returns what was seen."""
    after, seen = architecture.observe(block, state)
    plain = architecture.run_block(block, state)
    assert torch.equal(after.image, plain.image) and torch.equal(after.text, plain.text)
    assert not block._forward_hooks and not block.attn.add_q_proj._forward_pre_hooks
    return seen


def check_own_forward(architecture: Architecture, padded_inputs, **parts) -> None:
    """diffusers' forward of a model with these intervals and sites: block by block with states it
    is the same to the bit."""
    config = dict(architecture.tiny_config)
    blocks = architecture.num_blocks(config)
    plan = PruningPlan(
        architecture=architecture.name, config=config, num_blocks=blocks, fingerprint="f", **parts
    )
    pruned = empty_model(architecture, config, layout_of(plan, plan.everything()))
    torch.manual_seed(3)
    state_dict = {name: 0.1 * torch.randn(t.shape) for name, t in pruned.state_dict().items()}
    pruned.load_state_dict(state_dict, assign=True)
    inputs = padded_inputs()
    with torch.no_grad():
        whole = architecture.call(pruned, inputs)
        # leaves its own text with the groups
        other = architecture.call(pruned, padded_inputs(seed=1))
        state = architecture.embed(pruned, inputs)
        for index in range(blocks):
            prefix = architecture.block_prefix(config, index)
            state = architecture.run_block(pruned.get_submodule(prefix.rstrip(".")), state)
        assert torch.equal(architecture.finish(pruned, state), whole)
        assert torch.equal(architecture.call(pruned, inputs), whole) and not torch.equal(
            whole, other
        )
