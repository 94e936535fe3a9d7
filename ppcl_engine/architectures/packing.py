"""Latents as tokens: of 2 x 2 positions, as Qwen-Image's and FLUX's pipelines pack them, or of one."""

from __future__ import annotations

import torch

VAE_PIXELS = 8  # pixels a side that a latent position of their VAEs covers
FLAT_PIXELS = 16  # of the VAE whose latents are not packed


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


class FlatLatents:
    """The same where a latent position is a token, as Qwen-Image 2.1's pipeline packs them; sides
    are even all the same."""

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """[n, c, h, w] -> tokens [n, h * w, c]. Raises ValueError for odd sides."""
        h, w = latents.shape[-2:]
        if h % 2 or w % 2:
            raise ValueError(
                f"latents of {h} x {w} cannot be packed, their sides are even; resize the picture"
            )
        return latents.flatten(2).transpose(1, 2)

    def unpack(self, tokens: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`."""
        _, rows, columns = grid[0].tolist()
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))

    def grid(self, latents: torch.Tensor) -> torch.Tensor:
        """[1, 3] (frames, rows, columns) of tokens"""
        return torch.tensor([[1, latents.shape[-2], latents.shape[-1]]])

    def latent_shape(self, config: dict, height: int, width: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of a picture in pixels. Raises ValueError for sizes that do not
        divide."""
        if height % (2 * FLAT_PIXELS) or width % (2 * FLAT_PIXELS):
            raise ValueError(
                f"{height} x {width} pixels is not a multiple of {2 * FLAT_PIXELS}; change --height, --width"
            )
        return config["in_channels"], height // FLAT_PIXELS, width // FLAT_PIXELS
