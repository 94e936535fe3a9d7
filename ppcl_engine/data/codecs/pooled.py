"""Pipelines with a VAE of one shift and scale, and of these the ones with pooled text besides the
tokens: what FLUX.1 and SD3.5 share."""

from __future__ import annotations

import torch
from torch import nn

from ...architectures import Inputs
from ...architectures.modules import AnyModule
from .pipeline import TEXTS_AT_ONCE, PipelineCodec, read_part


class ScaledCodec(PipelineCodec):
    """A VAE with one shift and scale."""

    def _sizes(self, config: dict) -> tuple[int, int]:
        return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)

    def _statistics(self, vae: AnyModule, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.tensor([vae.config.shift_factor, 1 / vae.config.scaling_factor])
        mean, deviation = values.to(like.device, like.dtype)
        return mean, deviation

    def _vae_class(self) -> type:
        from diffusers import AutoencoderKL

        return AutoencoderKL

    def _encoder(self, kind: type, name: str) -> nn.Module:
        return read_part(kind, self.folder / name, dtype=self.dtype).to(self.device)


class PooledCodec(ScaledCodec):
    """Pooled text besides the tokens (padding counts)."""

    def _text(self, texts: list[str]) -> Inputs:
        """Embeddings [n, tokens, width], the same number of tokens for every caption, and pooled
        text [n, width]."""
        pipeline, rows = self._open_text_pipeline(), []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            with torch.no_grad():
                encoded = self._encoded(pipeline, texts[first : first + TEXTS_AT_ONCE])
            rows.append([part.float().cpu() for part in encoded])
        embeddings, pooled = (torch.cat(part) for part in zip(*rows, strict=True))
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def _encoded(self, pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError
