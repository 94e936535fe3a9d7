"""2:4 kernels: parity where a GPU has them, nothing at all elsewhere."""

import pytest
import torch
from torch import nn

from ppcl_engine.algorithms.sparsity.kernels import is_two_of_four, on_kernels
from ppcl_engine.algorithms.sparsity.patterns import kept_of_groups, pattern_named


def two_of_four(dtype=torch.float32, device="cpu") -> nn.Linear:
    layer = nn.Linear(128, 64, device=device, dtype=dtype).requires_grad_(False)
    layer.weight.masked_fill_(~kept_of_groups(layer.weight.abs().float(), pattern_named("2:4")), 0)
    return layer


def test_without_a_gpu_nothing_changes():
    layer = two_of_four(torch.bfloat16)
    before = layer.weight
    assert on_kernels(nn.Sequential(layer)) == 0 and layer.weight is before


def test_what_counts_as_two_of_four():
    assert is_two_of_four(two_of_four().weight)
    assert not is_two_of_four(nn.Linear(128, 64).weight)
    assert not is_two_of_four(torch.zeros(4, 6))


@pytest.mark.gpu
def test_parity_on_a_gpu():
    model = nn.Sequential(
        two_of_four(torch.bfloat16, "cuda"), nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16)
    )
    x = torch.randn(32, 128, device="cuda", dtype=torch.bfloat16)
    expected = model(x)
    has_kernels = torch.cuda.get_device_capability() >= (8, 0)
    assert on_kernels(model) == int(has_kernels)
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
