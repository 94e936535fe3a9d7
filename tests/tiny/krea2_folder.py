"""A tiny random diffusers folder in the layout of the released Krea 2, built without a network."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .models import enlarge
from .qwen_image_21_folder import TEXT_WIDTH, text_encoder
from .qwen_image_folder import SCHEDULER_CONFIG, VAE_CONFIG, vocabulary, write_tokenizer

LATENT_CHANNELS = VAE_CONFIG["z_dim"]
WORDS = ("system", "Describe", "user", "assistant", "Ġthe", "Ġimage", "Ġby", "Ġdetailing", "Ġcat")
LAYERS = (0, 2)  # of the text encoder's states, the first being its embedding
TRANSFORMER_CONFIG = {
    "in_channels": 4 * LATENT_CHANNELS,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "timestep_embed_dim": 32,
    "text_hidden_dim": TEXT_WIDTH,
    "num_text_layers": len(LAYERS),
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 2,
    "text_intermediate_size": 64,
    "axes_dims_rope": [4, 6, 6],
}
MODEL_INDEX = {
    "_class_name": "Krea2Pipeline",
    "_diffusers_version": "0.42.0",
    "is_distilled": False,
    "patch_size": 2,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3VLModel"],
    "text_encoder_select_layers": LAYERS,
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "Krea2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def build_tiny_krea2_pipeline(folder: Path, seed: int = 0) -> Path:
    """Writes the folder (about 2 MB) and returns it. The same seed gives the same weights."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        Krea2Transformer2DModel,
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = Krea2Transformer2DModel(**TRANSFORMER_CONFIG)
        enlarge(transformer)
        transformer.save_pretrained(folder / "transformer")
        AutoencoderKLQwenImage(**VAE_CONFIG).save_pretrained(folder / "vae")
        text_encoder(vocabulary(WORDS)).model.save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", WORDS)
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))
    return folder
