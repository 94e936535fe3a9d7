"""What surrounds SD3.5 in a diffusers pipeline folder."""

from __future__ import annotations

import torch

from .pipeline import read_tokenizer
from .pooled import PooledCodec

SD3_TEXT_TOKENS = 256  # of StableDiffusion3Pipeline's call, without CLIP's 77


class StableDiffusion3Codec(PooledCodec):
    """`StableDiffusion3Pipeline`: tokens and pooled text of two CLIPs, then T5's tokens."""

    text_parts = tuple(
        part for n in ("", "_2", "_3") for part in (f"text_encoder{n}/config.json", f"tokenizer{n}")
    )

    def _spacing(self, steps: int) -> dict:
        """The number of steps: the scheduler spaces them itself."""
        return {"num_inference_steps": steps}

    def _encoded(self, pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"do_classifier_free_guidance": False, "max_sequence_length": SD3_TEXT_TOKENS}
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, device=self.device, **options
        )
        return embeddings, pooled

    def _open_text_pipeline(self):
        if self._text_pipeline is None:
            from transformers import (
                CLIPTextModelWithProjection,
                CLIPTokenizer,
                T5EncoderModel,
                T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
            )

            self._text_pipeline = self._pipeline_class()(
                scheduler=None,
                vae=None,
                text_encoder=self._encoder(CLIPTextModelWithProjection, "text_encoder"),
                tokenizer=read_tokenizer(CLIPTokenizer, self.folder / "tokenizer"),
                text_encoder_2=self._encoder(CLIPTextModelWithProjection, "text_encoder_2"),
                tokenizer_2=read_tokenizer(CLIPTokenizer, self.folder / "tokenizer_2"),
                text_encoder_3=self._encoder(T5EncoderModel, "text_encoder_3"),
                tokenizer_3=read_tokenizer(T5TokenizerFast, self.folder / "tokenizer_3"),
                transformer=None,
            )
        return self._text_pipeline

    def _pipeline_class(self) -> type:
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline
