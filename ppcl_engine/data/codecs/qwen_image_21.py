"""What surrounds Qwen-Image 2.1 in a diffusers pipeline folder."""

from __future__ import annotations

import torch

from ...system.schemas import read_checked_object
from .pipeline import read_part, read_tokenizer
from .pipeline_files import QwenImage21Index
from .qwen_image import QwenImageCodec

LATENT_SIDE = 64  # of the picture that the pipeline's call draws unless it is told a size


class QwenImage21Codec(QwenImageCodec):
    """`QwenImage21Pipeline`: the last layer of Qwen3-VL before its norm, and a VAE whose pictures
    have an alpha channel.

    The model is meant to be drawn from without guidance: our guidance 1, the pipeline's
    true_cfg_scale 1. Condition images, which the pipeline also takes, are not read.
    """

    rescales_guidance = False
    latent_side = LATENT_SIDE
    text_parts = ("text_encoder/config.json", "processor")

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W], which are opaque -> [n, channels, H/16, W/16]"""
        return super().latents(torch.cat([pictures, torch.ones_like(pictures[:, :1])], dim=1))

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """[n, channels, h, w] -> [n, 3, 16h, 16w], over white"""
        drawn = super().pictures(latents)
        colour, alpha = drawn[:, :3], drawn[:, 3:]
        return colour * alpha + (1 - alpha)

    def _spacing(self, steps: int) -> dict:
        """A model made for few steps has its own in its model_index.json."""
        path = self.folder / "model_index.json"
        own = read_checked_object(path, QwenImage21Index).get("sample_sigmas")
        if own is None:
            return super()._spacing(steps)
        if len(own) != steps:
            raise ValueError(
                f"{path} has sample_sigmas, of {len(own)} steps; give --steps {len(own)}"
            )
        return {"sigmas": own}

    def _encoded(self, pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return pipeline.encode_prompt(texts, device=self.device)[:2]

    def _open_text_pipeline(self):
        if self._text_pipeline is None:
            from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

            encoder = read_part(
                Qwen3VLForConditionalGeneration, self.folder / "text_encoder", dtype=self.dtype
            )
            tokenizer = read_tokenizer(Qwen2Tokenizer, self.folder / "processor")
            self._text_pipeline = self._pipeline_class()(
                scheduler=None,
                vae=None,
                text_encoder=encoder.to(self.device),
                processor=TextProcessor(tokenizer),
                transformer=None,
            )
        return self._text_pipeline

    def _pipeline_class(self) -> type:
        from diffusers import QwenImage21Pipeline

        return QwenImage21Pipeline

    def _vae_class(self) -> type:
        from diffusers import AutoencoderKLQwenImage21

        return AutoencoderKLQwenImage21


class TextProcessor:
    """The part of transformers' Qwen3VLProcessor that text needs; the whole one also reads pictures
    and videos and needs torchvision for them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, **options):
        return self.tokenizer(**options)

    def apply_chat_template(self, messages: list[dict], **options) -> list[list[int]]:
        """The tokens of a system message, which the pipeline asks for to drop as many."""
        texts = [part["text"] for message in messages for part in message["content"]]
        return [self.tokenizer(f"<|im_start|>system\n{''.join(texts)}<|im_end|>\n").input_ids]
