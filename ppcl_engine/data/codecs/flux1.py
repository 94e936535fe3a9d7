"""What surrounds FLUX.1 in a diffusers pipeline folder."""

from __future__ import annotations

import torch

from .pipeline import TEXT_TOKENS, read_tokenizer
from .pooled import PooledCodec


class FluxCodec(PooledCodec):
    """`FluxPipeline`: CLIP's pooled text, T5's tokens."""

    text_parts = (
        "text_encoder/config.json",
        "tokenizer",
        "text_encoder_2/config.json",
        "tokenizer_2",
    )

    def _encoded(self, pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings, pooled, _ = pipeline.encode_prompt(
            texts, device=self.device, max_sequence_length=TEXT_TOKENS
        )
        return embeddings, pooled

    def _open_text_pipeline(self):
        if self._text_pipeline is None:
            from transformers import (
                CLIPTextModel,
                CLIPTokenizer,
                T5EncoderModel,
                T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
            )

            self._text_pipeline = self._pipeline_class()(
                scheduler=None,
                vae=None,
                text_encoder=self._encoder(CLIPTextModel, "text_encoder"),
                tokenizer=read_tokenizer(CLIPTokenizer, self.folder / "tokenizer"),
                text_encoder_2=self._encoder(T5EncoderModel, "text_encoder_2"),
                tokenizer_2=read_tokenizer(T5TokenizerFast, self.folder / "tokenizer_2"),
                transformer=None,
            )
        return self._text_pipeline

    def _pipeline_class(self) -> type:
        from diffusers import FluxPipeline

        return FluxPipeline
