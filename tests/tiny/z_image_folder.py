"""A tiny random diffusers folder in the layout of the released Z-Image-Turbo, built without a
network."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .flux1_folder import LATENT_CHANNELS, VAE_CONFIG
from .models import enlarge
from .qwen_image_folder import vocabulary, write_tokenizer

TEXT_WIDTH = 32
WORDS = ("user", "assistant", "Ġred", "Ġcat", "Ġthe", "Ġimage", "Ġof", "Ġsea")
TEMPLATE = (  # Qwen3's, of one message, as the pipeline asks for it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRANSFORMER_CONFIG = {
    "in_channels": LATENT_CHANNELS,
    "dim": 48,
    "n_layers": 6,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": TEXT_WIDTH,
    "axes_dims": [4, 6, 6],
    "axes_lens": [1536, 512, 512],
}
MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": "0.36.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def build_tiny_z_image_pipeline(folder: Path, seed: int = 0) -> Path:
    """Writes the folder (about 4 MB) and returns it. The same seed gives the same weights."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        ZImageTransformer2DModel,
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(**TRANSFORMER_CONFIG)
        enlarge(transformer)
        transformer.save_pretrained(folder / "transformer")
        AutoencoderKL(**VAE_CONFIG).save_pretrained(folder / "vae")
        _text_encoder(vocabulary(WORDS)).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", WORDS)
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))
    return folder


def _text_encoder(tokens: dict[str, int]) -> torch.nn.Module:
    """With a head for the next token, as the released folder has it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokens),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=2048,
            bos_token_id=tokens["<|endoftext|>"],
            eos_token_id=tokens["<|im_end|>"],
        )
    )
