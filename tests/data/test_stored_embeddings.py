"""Captions encoded elsewhere: padded where lengths differ, refused by tensor and shape."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.data.stored_embeddings import MASK, stored_prompts
from ppcl_engine.system.tensor_files import write_tensors

QWEN = architecture_named("qwen_image")
WIDTH = QWEN.tiny_config["joint_attention_dim"]


def good() -> dict[str, torch.Tensor]:
    return {
        "text": torch.randn(3, 4, WIDTH),
        "empty": torch.randn(1, 9, WIDTH),
        "mask": torch.ones(3, 4, dtype=torch.bool),
    }


def prompts(path, **changes):
    tensors = {**good(), **changes}
    write_tensors(path, {n: t for n, t in tensors.items() if t is not None})
    empty = torch.tensor([False, True, False])
    return stored_prompts(path, QWEN, QWEN.tiny_config, empty, 64, 64)


def test_an_empty_caption_may_be_longer_than_the_others(tmp_path):
    made = prompts(tmp_path / "e.safetensors")
    text, mask = made.positive["encoder_hidden_states"], made.positive[MASK]
    assert text.shape == (3, 9, WIDTH) and mask.sum(dim=1).tolist() == [4, 9, 4]
    assert torch.equal(text[1], made.negative["encoder_hidden_states"][0])


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("text", torch.tensor(1.0)),
        ("text", torch.zeros(0, 9, WIDTH)),
        ("text", torch.zeros(3, 4, WIDTH - 1)),
        ("empty", torch.zeros(1, 9, WIDTH // 2)),
        ("empty", torch.zeros(3, 9, WIDTH)),
        ("empty", torch.zeros(9, WIDTH)),
        ("mask", torch.ones(1, 4, dtype=torch.bool)),
        ("mask", torch.ones(3, 5, dtype=torch.bool)),
        ("mask", torch.zeros(3, 4, dtype=torch.bool)),
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path, name, tensor):
    with pytest.raises(ValueError, match=rf"e\.safetensors: {name}") as error:
        prompts(tmp_path / "e.safetensors", **{name: tensor})
    assert "\n" not in str(error.value)
