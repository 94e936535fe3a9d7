"""Moments in 8 bits and averages in bfloat16: how far they are off, and that small steps count."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine.algorithms.distillation.compact_state import (
    is_packed,
    pack,
    rounded_at_random,
    scale_shape,
    unpack,
)
from ppcl_engine.algorithms.distillation.saved_training import check_training
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

SHAPE = (48, 256)


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_of_moments(signed):
    """Values of blocks whose sizes differ by 1e12, which one scale for all would set to 0."""
    sizes = torch.logspace(-12, 0, SHAPE[0])[:, None]
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * sizes
    moments = values if signed else values.square()
    codes, scales = pack(moments, signed)
    assert codes.element_size() == 1 and tuple(scales.shape) == scale_shape(SHAPE)
    found = unpack(codes, scales, signed)
    near = values.abs() > 1e-4 * sizes  # 3 bits of a mantissa: a 16th at most
    off = (found if signed else found.sqrt()) / (values if signed else values.abs()) - 1
    assert off[near].abs().max() <= 1 / 16 + 1e-6
    assert signed or (found[values != 0] > 0).all()


def test_moments_that_are_zero_stay_zero():
    zeros = torch.zeros(SHAPE)
    for signed in (True, False):
        assert torch.equal(unpack(*pack(zeros, signed), signed), zeros)


def test_which_tensors_are_packed():
    assert is_packed(SHAPE)
    assert not is_packed((3072,)) and not is_packed((100, 101))


def test_a_step_below_half_of_what_bfloat16_knows_counts_in_the_mean():
    values, steps = torch.ones(4096), 32
    step = 2.0**-8 / steps  # the next value above 1 is 2^-7 away
    for number in range(steps):
        values = rounded_at_random(values + step, number).float()
    assert values.mean() == pytest.approx(1 + 2.0**-8, abs=4e-4)
    assert torch.equal(rounded_at_random(-values, 0).float(), -values)  # exact values stay


@pytest.mark.parametrize("lacks", ["codes", "scales"])
def test_codes_without_scales_are_not_taken_for_moments(tmp_path, lacks):
    """Codes reach 448: taken for moments they would be another training."""
    codes, scales = pack(torch.rand(SHAPE), signed=True)
    moment = {"first.w": codes, "first_scale.w": scales, "second.w": torch.rand(SHAPE)}
    moment |= {"first.w": torch.rand(SHAPE)} if lacks == "codes" else {}
    kept = {name: t for name, t in moment.items() if lacks == "codes" or "scale" not in name}
    path = tmp_path / "tuned.safetensors"
    write_tensors(path, {"weight.w": torch.rand(SHAPE), **kept}, {"step": "1"})
    with pytest.raises(ValueError, match=r"first\.w and first_scale\.w do not match; train it"):
        check_training(TensorFile(path), {"w": SHAPE})
