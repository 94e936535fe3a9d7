"""A tiny random diffusers folder in the layout of the released SD3.5, built without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from .flux1_folder import TEXT_WIDTH, VAE_CONFIG, enlarge, t5_encoder, write_tokenizers

LATENT_CHANNELS = VAE_CONFIG["latent_channels"]
CLIP_WIDTHS = (8, 12)  # of the two encoders; side by side they are filled up to the width of T5
TRANSFORMER_CONFIG = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": LATENT_CHANNELS,
    "num_layers": 6,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 32,
    "pooled_projection_dim": sum(CLIP_WIDTHS),
    "out_channels": LATENT_CHANNELS,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0, 1, 2),
    "qk_norm": "rms_norm",
}
SHIFT, SCALE = 0.0609, 1.5305
MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.30.3.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
    "feature_extractor": [None, None],
}


def build_tiny_sd35_pipeline(folder: Path, seed: int = 0) -> Path:
    """Writes the folder (about 2 MB) and returns it. The same seed gives the same weights."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clip, t5 = write_tokenizers(folder)
    (folder / "tokenizer_2").rename(folder / "tokenizer_3")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(**TRANSFORMER_CONFIG)
        enlarge(transformer)
        transformer.save_pretrained(folder / "transformer")
        vae = AutoencoderKL(**{**VAE_CONFIG, "shift_factor": SHIFT, "scaling_factor": SCALE})
        vae.save_pretrained(folder / "vae")
        for name, width in zip(("text_encoder", "text_encoder_2"), CLIP_WIDTHS, strict=True):
            _clip(clip, width).save_pretrained(folder / name)
        t5_encoder(t5).save_pretrained(folder / "text_encoder_3")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))
    return folder


def _clip(vocabulary: int, width: int) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModelWithProjection(config)
