"""What surrounds Z-Image in a diffusers pipeline folder."""

from __future__ import annotations

import torch

from ...architectures import Inputs
from .pipeline import TEXT_TOKENS, TEXTS_AT_ONCE, padded, read_tokenizer
from .pooled import ScaledCodec


class ZImageCodec(ScaledCodec):
    """`ZImagePipeline`: the last layer but one of Qwen3, of the caption in its chat template.

    The pipeline's call counts guidance from 0: its guidance_scale 0 (Turbo's) is our guidance 1, its
    5 our 6.
    """

    text_parts = ("text_encoder/config.json", "tokenizer")

    def _text(self, texts: list[str]) -> Inputs:
        """Embeddings [n, tokens, width] and mask [n, tokens] (True = real), zeros after the real
        tokens."""
        pipeline = self._open_text_pipeline()
        rows: list[torch.Tensor] = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            # a copy: the pipeline writes its template into the list
            chunk = list(texts[first : first + TEXTS_AT_ONCE])
            with torch.no_grad():
                encoded, _ = pipeline.encode_prompt(
                    chunk,
                    device=self.device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=TEXT_TOKENS,
                )
            rows += [row.float().cpu() for row in encoded]
        return padded(rows)

    def _open_text_pipeline(self):
        if self._text_pipeline is None:
            from transformers import Qwen2Tokenizer, Qwen3Model

            self._text_pipeline = self._pipeline_class()(
                scheduler=None,
                vae=None,
                text_encoder=self._encoder(Qwen3Model, "text_encoder"),
                tokenizer=read_tokenizer(Qwen2Tokenizer, self.folder / "tokenizer"),
                transformer=None,
            )
        return self._text_pipeline

    def _pipeline_class(self) -> type:
        from diffusers import ZImagePipeline

        return ZImagePipeline
