"""Latents as tokens of 2 x 2 positions, as Qwen-Image's and FLUX's pipelines pack them."""

from __future__ import annotations

import torch

VAE_PIXELS = 8  # pixels a latent position of their VAEs covers


class PackedLatents:
    """The part of an architecture that turns latents into tokens and back; `in_channels` counts a
    token's channels."""

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """[n, c, h, w] -> tokens [n, h/2 * w/2, 4c], as diffusers' pipelines pack them. Raises
        ValueError for odd sides."""
        n, c, h, w = latents.shape
        if h % 2 or w % 2:
            raise ValueError(
                f"latents of {h} x {w} cannot be packed into tokens of 2 x 2; resize the picture"
            )
        return (
            latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * c)
        )

    def unpack(self, tokens: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack` for the first picture of `grid` [pictures, 3]."""
        _, rows, columns = grid[0].tolist()
        n, _, channels = tokens.shape
        tokens = tokens[:, : rows * columns].reshape(n, rows, columns, channels // 4, 2, 2)
        return tokens.permute(0, 3, 1, 4, 2, 5).reshape(n, channels // 4, rows * 2, columns * 2)

    def grid(self, latents: torch.Tensor) -> torch.Tensor:
        """[1, 3] (frames, rows, columns) of tokens"""
        return torch.tensor([[1, latents.shape[-2] // 2, latents.shape[-1] // 2]])

    def latent_shape(self, config: dict, height: int, width: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of a picture in pixels. Raises ValueError for sizes that do not
        divide."""
        if height % (2 * VAE_PIXELS) or width % (2 * VAE_PIXELS):
            raise ValueError(
                f"{height} x {width} pixels is not a multiple of {2 * VAE_PIXELS}; change --height, --width"
            )
        return config["in_channels"] // 4, height // VAE_PIXELS, width // VAE_PIXELS
