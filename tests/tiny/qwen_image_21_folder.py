"""A tiny random diffusers folder in the layout of the released Qwen-Image-2.1, built without a
network."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .models import enlarge
from .qwen_image_folder import SCHEDULER_CONFIG, vocabulary, write_tokenizer

LATENT_CHANNELS, TEXT_WIDTH = 4, 32
WORDS = ("system", "Comprehend", "user", "assistant", "Ġand", "Ġanalyze", "Ġthe", "Ġprompt", "Ġcat")
TEMPLATE = (  # Qwen3-VL's, of messages in parts
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)
TRANSFORMER_CONFIG = {
    "patch_size": 1,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 1,
    "context_in_dim": TEXT_WIDTH,
    "axes_dims_rope": [4, 14, 14],
}
VAE_CONFIG = {
    "base_dim": 4,
    "decoder_base_dim": 4,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 1, 2, 2, 2],
    "num_res_blocks": 1,
    "latents_mean": [-0.7571, 0.1075, 0.9653, -0.1517],
    "latents_std": [2.8184, 1.4541, 0.6558, 1.2196],
}
MODEL_INDEX = {
    "_class_name": "QwenImage21Pipeline",
    "_diffusers_version": "0.37.0.dev0",
    "processor": ["transformers", "Qwen3VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
    "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage21"],
}


def build_tiny_qwen_image_21_pipeline(folder: Path, seed: int = 0) -> Path:
    """Writes the folder (about 1 MB) and returns it. The same seed gives the same weights."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Transformer2DModel,
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = QwenImage21Transformer2DModel(**TRANSFORMER_CONFIG)
        enlarge(transformer)
        transformer.save_pretrained(folder / "transformer")
        AutoencoderKLQwenImage21(**VAE_CONFIG).save_pretrained(folder / "vae")
        _text_encoder(vocabulary(WORDS)).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "processor", WORDS)
    (folder / "processor" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))
    return folder


def _text_encoder(tokens: dict[str, int]) -> torch.nn.Module:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {
        "vocab_size": len(tokens),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
    )
    return Qwen3VLForConditionalGeneration(config)
