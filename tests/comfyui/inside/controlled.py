"""Conditioning with a ControlNet, by the stock node."""

from __future__ import annotations

from collections.abc import Callable

import torch


class RandomVAE:
    """frames: of its latents; () for those of pictures alone."""

    def __init__(self, frames: tuple[int, ...]):
        self.frames = frames

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        generator = torch.Generator().manual_seed(4)
        size = (pixels.shape[1] // 8, pixels.shape[2] // 8)
        return torch.randn(1, 16, *self.frames, *size, generator=generator)


def controlled(run_node, inputs, net) -> Callable[[], list]:
    conditioning, image = [[inputs.text, inputs.more]], torch.rand(1, 64, 96, 3)
    vae = RandomVAE(tuple(inputs.latents.shape[2:-2]))
    return lambda: run_node(
        "ControlNetApplyAdvanced",
        positive=conditioning,
        negative=conditioning,
        control_net=net,
        image=image,
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
        vae=vae,
    )[0]
