"""The shapes that are computed are those of diffusers' modules."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine.architectures import ARCHITECTURES
from ppcl_engine.architectures.shapes import TABLES, block_shapes, has_one_stream, outer_shapes

TABLE = {"form": "table", "inputs": 4, "batches": [1, 2], "precision": "float32"}
OPTIONS = {
    "qwen_image": (
        {"zero_cond_t": True},
        {"use_additional_t_cond": True, "out_channels": None},
        {"folding": TABLE},
        {"folding": {"form": "basis", "inputs": 3}},
    ),
    "flux1": ({"guidance_embeds": False}, {"out_channels": 8}),
    "z_image": ({"n_refiner_layers": 2}, {"dim": 96, "n_heads": 6}),
    "qwen_image_21": ({"mlp_ratio": 2}, {"out_channels": None}),
    "sd35": ({"qk_norm": None}, {"qk_norm": "layer_norm", "dual_attention_layers": [5]}),
}
CASES = {
    f"{a.name}-{name}": (a, config)
    for a in ARCHITECTURES
    for name, config in {
        **a.model_configs,
        "tiny": a.tiny_config,
        **{str(n): {**a.tiny_config, **more} for n, more in enumerate(OPTIONS[a.name])},
    }.items()
}


def shapes_of(module: torch.nn.Module) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_they_are_the_modules_own(case):
    architecture, config = CASES[case]
    indices = {0, *(s.start for s in architecture.sections(config))}
    indices |= {architecture.num_blocks(config) - 1, architecture.num_blocks(config) // 2}
    with torch.device("meta"):
        outer = architecture.build_outer(config)
        for index in indices:
            block = architecture.build_block(config, index)
            computed = block_shapes(architecture, config, index)
            assert computed == shapes_of(block)
            two_streams = hasattr(getattr(block, "attn", None), "add_q_proj")
            assert has_one_stream(computed) == (not two_streams)
            assert not list(block.buffers())
    assert outer_shapes(architecture, config) == shapes_of(outer)
    saved = {name for name, _ in outer.named_buffers()} & outer.state_dict().keys()
    assert saved == {name for name in outer.state_dict() if name.endswith(TABLES)}


def test_a_norm_that_is_not_read_is_named():
    sd35 = next(a for a in ARCHITECTURES if a.name == "sd35")
    with pytest.raises(ValueError, match="qk_norm 'l2' is not read; known: rms_norm"):
        block_shapes(sd35, {**sd35.tiny_config, "qk_norm": "l2"}, 0)
