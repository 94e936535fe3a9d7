"""SSIM against its closed forms; peak memory sees what was allocated and freed."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine.algorithms.picture_metrics import ssim


def test_ssim_of_equal_pictures_is_one():
    pictures = torch.rand(3, 3, 24, 20)
    assert torch.allclose(ssim(pictures, pictures), torch.ones(3, dtype=torch.float64))


def test_ssim_of_flat_pictures_is_the_luminance_term():
    a, b = 0.3, 0.7
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    value = ssim(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b))
    assert float(value) == pytest.approx(expected, abs=1e-6)


def test_ssim_falls_with_noise_and_is_symmetric():
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 32, 32)
    little, much = (
        picture + 0.02 * torch.randn_like(picture),
        picture + 0.2 * torch.randn_like(picture),
    )
    assert float(ssim(picture, little)) > float(ssim(picture, much))
    assert torch.allclose(ssim(picture, much), ssim(much, picture))
