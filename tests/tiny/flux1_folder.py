"""A tiny random diffusers folder in the layout of the released FLUX.1-dev, built without a
network."""

from __future__ import annotations

import json
from pathlib import Path

import torch

LATENT_CHANNELS, TEXT_WIDTH, POOLED_WIDTH = 4, 24, 20
WORDS = ("a", "red", "cat", "the", "image", "of", "by", "sea")
TRANSFORMER_CONFIG = {
    "patch_size": 1,
    "in_channels": 4 * LATENT_CHANNELS,
    "num_layers": 3,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": POOLED_WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 6, 8),
}
VAE_CONFIG = {  # a picture becomes 4 times smaller, not 8 times as in the released model
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": LATENT_CHANNELS,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SCHEDULER_CONFIG = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def build_tiny_flux_pipeline(folder: Path, seed: int = 0) -> Path:
    """Writes the folder (about 1 MB) and returns it. The same seed gives the same weights."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clip, t5 = write_tokenizers(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(**TRANSFORMER_CONFIG)
        enlarge(transformer)
        transformer.save_pretrained(folder / "transformer")
        AutoencoderKL(**VAE_CONFIG).save_pretrained(folder / "vae")
        _clip(clip).save_pretrained(folder / "text_encoder")
        t5_encoder(t5).save_pretrained(folder / "text_encoder_2")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))
    return folder


def enlarge(model: torch.nn.Module) -> None:
    """Weights so large that every block matters, as in a trained model."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(
                noise / parameter.shape[1] ** 0.5
                if parameter.ndim == 2
                else parameter + 0.1 * noise
            )


def write_tokenizers(folder: Path) -> tuple[int, int]:
    """Sizes of their vocabularies. Both know a few words; others fall apart (CLIP) or are unknown
    (T5)."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer, T5TokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    clip = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)
    clip.save_pretrained(folder / "tokenizer")
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    scores += [(f"\u2581{word}", -1.0) for word in WORDS]
    t5 = T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=512)
    t5.save_pretrained(folder / "tokenizer_2")
    return len(clip), len(t5)


def _clip(vocabulary: int) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=POOLED_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=POOLED_WIDTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def t5_encoder(vocabulary: int) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)
