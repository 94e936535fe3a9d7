"""What surrounds Qwen-Image and Qwen-Image-Edit in a diffusers pipeline folder."""

from __future__ import annotations

import re

import torch

from ...architectures import Inputs
from ...architectures.modules import AnyModule
from .base import check_references
from .pipeline import (
    TEXT_TOKENS,
    TEXTS_AT_ONCE,
    PipelineCodec,
    padded,
    read_part,
    read_tokenizer,
)
from .pipeline_files import QwenVAE

IMAGE_TOKEN = "<|image_pad|>"


class QwenImageCodec(PipelineCodec):
    """`QwenImagePipeline`: one text encoder, and a video VAE."""

    rescales_guidance = True  # QwenImagePipeline's call does
    vae_schema = QwenVAE
    text_parts = ("text_encoder/config.json", "tokenizer")

    def _text(self, texts: list[str]) -> Inputs:
        """Embeddings [n, tokens, width] and mask [n, tokens] (True = real), zeros after the real
        tokens.

        For a mask that hides nothing the pipeline returns None; here it is all True.
        """
        pipeline = self._open_text_pipeline()
        rows: list[torch.Tensor] = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            chunk = texts[first : first + TEXTS_AT_ONCE]
            with torch.no_grad():
                embeddings, mask = self._encoded(pipeline, chunk)
            lengths = [embeddings.shape[1]] * len(chunk) if mask is None else mask.sum(1).tolist()
            rows += [
                row[:length].float().cpu() for row, length in zip(embeddings, lengths, strict=True)
            ]
        return padded(rows)

    def _encoded(self, pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return pipeline.encode_prompt(texts, self.device, max_sequence_length=TEXT_TOKENS)

    def _framed(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(2)

    def _still(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(2)

    def _sizes(self, config: dict) -> tuple[int, int]:
        return config["z_dim"], 2 ** len(config["temperal_downsample"])

    def _statistics(self, vae: AnyModule, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, channels, 1, 1, 1] each"""
        values = torch.tensor([vae.config.latents_mean, vae.config.latents_std])
        mean, deviation = values.to(like.device, like.dtype)[:, None, :, None, None, None]
        return mean, deviation

    def _open_text_pipeline(self):
        if self._text_pipeline is None:
            from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

            tokenizer = read_tokenizer(Qwen2Tokenizer, self.folder / "tokenizer")
            encoder = read_part(
                Qwen2_5_VLForConditionalGeneration, self.folder / "text_encoder", dtype=self.dtype
            )
            parts = {
                "text_encoder": encoder.to(self.device),
                "tokenizer": tokenizer,
                **self._more_parts(tokenizer),
            }
            self._text_pipeline = self._pipeline_class()(
                scheduler=None, vae=None, transformer=None, **parts
            )
        return self._text_pipeline

    def _pipeline_class(self) -> type:
        from diffusers import QwenImagePipeline

        return QwenImagePipeline

    def _more_parts(self, tokenizer) -> dict:
        return {}

    def _vae_class(self) -> type:
        from diffusers import AutoencoderKLQwenImage

        return AutoencoderKLQwenImage


class QwenImageEditCodec(QwenImageCodec):
    """`QwenImageEditPipeline`: the text encoder also sees the picture that an instruction
    changes."""

    edits = True
    text_parts = (*QwenImageCodec.text_parts, "processor/preprocessor_config.json")

    def text(self, texts: list[str], references: torch.Tensor | None = None) -> Inputs:
        """`references` [n, k, 3, H, W] in [0, 1]. One text at a time, as the pipelines encode
        them."""
        check_references(self.edits, references is not None, self.folder)
        pipeline, rows = self._open_text_pipeline(), []
        images, given = pipeline.image_processor, () if references is None else references
        for text, pictures in zip(texts, given, strict=True):
            seen = self._seen(pipeline, images.numpy_to_pil(images.pt_to_numpy(pictures)))
            with torch.no_grad():
                rows.append(pipeline.encode_prompt([text], seen, self.device)[0][0].float().cpu())
        return padded(rows)

    def _seen(self, pipeline, pictures: list):
        """The pictures as the pipeline's call shows them to its text encoder."""
        if len(pictures) > 1:
            raise ValueError(
                f"{self.folder} reads one reference with an instruction; {len(pictures)} are given"
            )
        return pictures[0]

    def _pipeline_class(self) -> type:
        from diffusers import QwenImageEditPipeline

        return QwenImageEditPipeline

    def _more_parts(self, tokenizer) -> dict:
        from transformers import Qwen2VLImageProcessor

        images = Qwen2VLImageProcessor.from_pretrained(
            self.folder / "processor", local_files_only=True
        )
        return {"processor": StillsProcessor(images, tokenizer)}


class QwenImageEditPlusCodec(QwenImageEditCodec):
    """`QwenImageEditPlusPipeline`: one reference or several, which its text encoder sees at a size
    of their own."""

    def _seen(self, pipeline, pictures: list) -> list:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

        sizes = [
            plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, p.width / p.height)
            for p in pictures
        ]
        resize = pipeline.image_processor.resize
        return [
            resize(p, height, width) for p, (width, height) in zip(pictures, sizes, strict=True)
        ]

    def _pipeline_class(self) -> type:
        from diffusers import QwenImageEditPlusPipeline

        return QwenImageEditPlusPipeline


class StillsProcessor:
    """The part of transformers' Qwen2VLProcessor that still pictures need; the whole one also reads
    videos and needs torchvision for them."""

    def __init__(self, images, tokenizer):
        self.images, self.tokenizer = images, tokenizer

    def __call__(self, text: list[str], images, padding: bool, return_tensors: str):
        """In the texts, a picture's placeholder becomes as many tokens as the picture has."""
        from transformers import BatchFeature

        seen = self.images(images=images, return_tensors=return_tensors)
        tokens = iter((seen["image_grid_thw"].prod(1) // self.images.merge_size**2).tolist())
        texts = [
            re.sub(re.escape(IMAGE_TOKEN), lambda place: place[0] * next(tokens), t) for t in text
        ]
        return BatchFeature(
            {**self.tokenizer(texts, padding=padding, return_tensors=return_tensors), **seen}
        )
