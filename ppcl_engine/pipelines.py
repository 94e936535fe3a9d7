"""The known diffusers pipelines, and those of FLUX and SD3.5, which read pooled text beside the tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .architectures import Inputs
from .files import read_json
from .pipeline_folder import PipelineCodec, read_part, read_tokenizer
from .qwen_pipelines import TEXT_TOKENS, TEXTS_AT_ONCE, QwenImageCodec, QwenImageEditCodec, QwenImageEditPlusCodec

SD3_TEXT_TOKENS = 256  # of StableDiffusion3Pipeline's call, without CLIP's 77


class PooledCodec(PipelineCodec):
    """With pooled text beside the tokens (padding counts), and a VAE with one shift and scale."""

    def _text(self, texts: list[str]) -> Inputs:
        """Embeddings [n, tokens, width], as many for every caption, and pooled text [n, width]."""
        pipeline, rows = self._open_text_pipeline(), []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            with torch.no_grad():
                encoded = self._encoded(pipeline, texts[first : first + TEXTS_AT_ONCE])
            rows.append([part.float().cpu() for part in encoded])
        embeddings, pooled = (torch.cat(part) for part in zip(*rows, strict=True))
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def _encoded(self, pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def _sizes(self, config: dict) -> tuple[int, int]:
        return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)

    def _statistics(self, vae: nn.Module, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.tensor([vae.config.shift_factor, 1 / vae.config.scaling_factor])
        mean, deviation = values.to(like.device, like.dtype)
        return mean, deviation

    def _vae_class(self) -> type:
        from diffusers import AutoencoderKL

        return AutoencoderKL

    def _encoder(self, kind: type, name: str) -> nn.Module:
        return read_part(kind, self.folder / name, dtype=self.dtype).to(self.device)


class FluxCodec(PooledCodec):
    """Of `FluxPipeline`: CLIP's pooled text, T5's tokens."""

    text_parts = ("text_encoder/config.json", "tokenizer", "text_encoder_2/config.json", "tokenizer_2")

    def _encoded(self, pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings, pooled, _ = pipeline.encode_prompt(texts, device=self.device, max_sequence_length=TEXT_TOKENS)
        return embeddings, pooled

    def _open_text_pipeline(self):
        if self._text_pipeline is None:
            from diffusers import FluxPipeline
            from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

            self._text_pipeline = FluxPipeline(
                scheduler=None,
                vae=None,
                text_encoder=self._encoder(CLIPTextModel, "text_encoder"),
                tokenizer=read_tokenizer(CLIPTokenizer, self.folder / "tokenizer"),
                text_encoder_2=self._encoder(T5EncoderModel, "text_encoder_2"),
                tokenizer_2=read_tokenizer(T5TokenizerFast, self.folder / "tokenizer_2"),
                transformer=None,
            )
        return self._text_pipeline


class StableDiffusion3Codec(PooledCodec):
    """Of `StableDiffusion3Pipeline`: tokens and pooled text of two CLIPs, then T5's tokens."""

    text_parts = tuple(part for n in ("", "_2", "_3") for part in (f"text_encoder{n}/config.json", f"tokenizer{n}"))

    def _spacing(self, steps: int) -> dict:
        """The steps' number: the scheduler spaces them itself."""
        return {"num_inference_steps": steps}

    def _encoded(self, pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"do_classifier_free_guidance": False, "max_sequence_length": SD3_TEXT_TOKENS}
        embeddings, _, pooled, _ = pipeline.encode_prompt(texts, None, None, device=self.device, **options)
        return embeddings, pooled

    def _open_text_pipeline(self):
        if self._text_pipeline is None:
            from diffusers import StableDiffusion3Pipeline
            from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

            self._text_pipeline = StableDiffusion3Pipeline(
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


PIPELINES = {
    "QwenImagePipeline": QwenImageCodec,
    "QwenImageEditPipeline": QwenImageEditCodec,
    "QwenImageEditPlusPipeline": QwenImageEditPlusCodec,
    "FluxPipeline": FluxCodec,
    "StableDiffusion3Pipeline": StableDiffusion3Codec,
}


def open_pipeline(folder: Path, device: str = "cpu") -> PipelineCodec:
    """The codec of the pipeline that the folder's model_index.json names. Raises ValueError for an unknown one."""
    name = read_json(folder / "model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{folder}/model_index.json is of a {name}; known pipelines: {', '.join(PIPELINES)}")
    return PIPELINES[name](folder, device)
