"""A tiny random diffusers folder in the layout of the released Qwen-Image-Edit, built without a
network.

The tokenizer knows every word of the pipelines' prompt template as one token, so that the
template's prefix is 64 tokens long, as many as the pipelines drop.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from .qwen_image_folder import MODEL_INDEX, build_tiny_pipeline

# pixels a side of what the text encoder sees; it reads 2 x 2 of them as one token
PATCH, MERGED = 14, 2


def build_tiny_edit_pipeline(folder: Path, kind: str = "QwenImageEditPipeline", **changes) -> Path:
    """`kind`: the pipeline's class; `changes`: of the transformer's configuration."""
    from transformers import Qwen2VLImageProcessor

    build_tiny_pipeline(folder, words=template_words(), **changes)
    images = Qwen2VLImageProcessor(
        min_pixels=(2 * MERGED * PATCH) ** 2, max_pixels=(4 * MERGED * PATCH) ** 2
    )
    images.save_pretrained(folder / "processor")
    index = {**MODEL_INDEX, "_class_name": kind, "processor": ["transformers", "Qwen2VLProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def template_words() -> list[str]:
    """The words of the prompt template, those after a space first: a merge inside a word then never
    comes before the word's own."""
    from diffusers import QwenImageEditPipeline
    from tokenizers import pre_tokenizers

    nothing = dict.fromkeys(
        ("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")
    )
    template = re.sub(r"<[^>]*>", "", QwenImageEditPipeline(**nothing).prompt_template_encode)
    words = [
        word
        for word, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(template)
    ]
    return sorted(dict.fromkeys(words), key=lambda word: word[0] != "Ġ")
