"""What surrounds Krea 2 in a diffusers pipeline folder."""

from __future__ import annotations

import torch

from ...system.schemas import read_checked_object
from .pipeline import TEXT_TOKENS, read_part, read_tokenizer
from .pipeline_files import Krea2Index
from .qwen_image import QwenImageCodec

DISTILLED_SHIFT = 1.15  # the pipeline's, for pictures of every size


class Krea2Codec(QwenImageCodec):
    """`Krea2Pipeline`: several layers of Qwen3-VL side by side, and Qwen-Image's VAE.

    The pipeline pads a caption in the middle; padding is read by nothing and is left out here. Its
    call counts guidance from 0: its guidance_scale 0 (the distilled model's) is our guidance 1, its
    4.5 our 5.5.
    """

    rescales_guidance = False

    def _shift(self, config, image_tokens: int) -> float:
        if self._index().get("is_distilled"):
            return DISTILLED_SHIFT
        return super()._shift(config, image_tokens)

    def _encoded(self, pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        layers, mask = pipeline.encode_prompt(texts, self.device, max_sequence_length=TEXT_TOKENS)
        return layers.flatten(2), mask

    def _open_text_pipeline(self):
        if self._text_pipeline is None:
            from transformers import Qwen2Tokenizer, Qwen3VLModel

            encoder = read_part(Qwen3VLModel, self.folder / "text_encoder", dtype=self.dtype)
            self._text_pipeline = self._pipeline_class()(
                scheduler=None,
                vae=None,
                text_encoder=encoder.to(self.device),
                tokenizer=read_tokenizer(Qwen2Tokenizer, self.folder / "tokenizer"),
                transformer=None,
                text_encoder_select_layers=self._index().get("text_encoder_select_layers"),
            )
        return self._text_pipeline

    def _pipeline_class(self) -> type:
        from diffusers import Krea2Pipeline

        return Krea2Pipeline

    def _index(self) -> dict:
        return read_checked_object(self.folder / "model_index.json", Krea2Index)
