"""Bits of weights: bounds of the errors, and zeros that stay zero."""

import pytest
import torch

from ppcl_engine.algorithms.distillation.quantization import BITS, rounded, simulated
from ppcl_engine.system.float8 import scaled_fp8
from ppcl_engine.system.tensor_files import MadeOnce

WEIGHT = torch.randn(12, 128, generator=torch.Generator().manual_seed(0))


def test_scaled_fp8_uses_the_whole_range():
    values, scale = scaled_fp8(WEIGHT)
    assert (
        values.dtype == torch.float8_e4m3fn
        and float(values.float().abs().max()) == 448
        and scale.shape == ()
    )
    error = (values.float() * scale - WEIGHT).abs()
    # three bits of mantissa, and the smallest step
    assert bool((error <= WEIGHT.abs() / 16 + scale * 2**-10).all())
    assert not scaled_fp8(torch.zeros(3, 4))[0].float().any()


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_to_half_a_step_of_the_row(bits):
    step = WEIGHT.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    found = rounded(WEIGHT, bits)
    assert bool(((found - WEIGHT).abs() <= step / 2 * 1.0001).all())
    torch.testing.assert_close(rounded(found, bits), found)
    assert all(len(row.unique()) <= 2**bits - 1 for row in found)


def test_fewer_bits_hurt_more_and_zeros_stay():
    sparse = WEIGHT.masked_fill(WEIGHT.abs() < 0.5, 0)
    errors = {kind: float((simulated(sparse, kind) - sparse).norm()) for kind in BITS}
    assert errors["int8"] < errors["fp8"] < errors["int4"]
    assert all(not simulated(sparse, kind)[sparse == 0].any() for kind in BITS)
    # groups do not divide it: a scale a row
    assert simulated(WEIGHT[:, :30], "int4").shape == (12, 30)
    with pytest.raises(ValueError, match="'int2' is unknown; known: fp8, int8, int4"):
        simulated(WEIGHT, "int2")


def test_parts_are_made_once():
    made = []
    parts = MadeOnce(lambda: made.append(1) or {"a": torch.ones(2), "b": torch.zeros(2)})
    assert parts.take("a").tolist() == [1, 1]
    assert parts.take("b").tolist() == [0, 0]
    assert len(made) == 1
