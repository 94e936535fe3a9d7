"""A tiny random diffusers folder in the layout of the released Qwen-Image, built without a network.

The tokenizer knows every word of the pipeline's prompt template as one token, so that the
template's prefix is 34 tokens long, as many as the pipeline drops; other words fall apart into
letters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from .models import enlarge

CAPTIONS = ["a red cat", "the image of the background", "", "by the sea, text"]
SIZE = ("--height", 32, "--width", 48)  # of what is drawn
DRAWING = ("--steps", 3, "--guidance", 2.0)
LATENT_CHANNELS = 4
TEXT_WIDTH = 32
SHARD_SIZE = "1MB"  # the transformer is about 4 MB, so it is cut into several files
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE_WORDS = (  # Ġ is how byte-level BPE writes a space
    *(
        "system",
        "Describe",
        "user",
        "assistant",
        "Ġthe",
        "Ġimage",
        "Ġby",
        "Ġdetailing",
        "Ġcolor",
        "Ġshape",
        "Ġsize",
    ),
    *(
        "Ġtexture",
        "Ġquantity",
        "Ġtext",
        "Ġspatial",
        "Ġrelationships",
        "Ġof",
        "Ġobjects",
        "Ġand",
        "Ġbackground",
    ),
)
TRANSFORMER_CONFIG = {
    "patch_size": 2,
    "in_channels": 4 * LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 14, 14),  # the released model's shares, which a ComfyUI file relies on
}
VAE_CONFIG = {  # a picture becomes 4 times smaller, not 8 times as in the released model
    "base_dim": 8,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [-0.7571, 0.1075, 0.9653, -0.1517],
    "latents_std": [2.8184, 1.4541, 0.6558, 1.2196],
}
SCHEDULER_CONFIG = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}
MODEL_INDEX = {
    "_class_name": "QwenImagePipeline",
    "_diffusers_version": "0.34.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def build_tiny_pipeline(
    folder: Path, seed: int = 0, words: Sequence[str] = TEMPLATE_WORDS, **changes
) -> Path:
    """Writes the folder (about 5 MB, a few seconds) and returns it. The same seed gives the same
    weights. `words`: what the tokenizer knows as one token; `changes`: of the transformer's
    configuration."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageTransformer2DModel,
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(**{**TRANSFORMER_CONFIG, **changes})
        enlarge(transformer)
        transformer.save_pretrained(folder / "transformer", max_shard_size=SHARD_SIZE)
        AutoencoderKLQwenImage(**VAE_CONFIG).save_pretrained(folder / "vae")
        text_encoder(vocabulary(words)).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", words)
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))
    return folder


def merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Every word grows letter by letter from its start."""
    pairs = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    return list(dict.fromkeys(pairs))


def vocabulary(words: Sequence[str]) -> dict[str, int]:
    """256 bytes, the words' beginnings, then the special tokens."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    grown = [first + last for first, last in merges(words)]
    tokens = dict.fromkeys([*letters, *grown, *SPECIAL_TOKENS])
    return {token: index for index, token in enumerate(tokens)}


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """The released folder's files: vocab.json, merges.txt, added_tokens.json,
    tokenizer_config.json."""
    tokens = vocabulary(words)
    special = {token: tokens.pop(token) for token in SPECIAL_TOKENS}
    decoder = {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, index in special.items()
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {last}" for first, last in merges(words))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def text_encoder(tokens: dict[str, int]) -> torch.nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(tokens),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)
