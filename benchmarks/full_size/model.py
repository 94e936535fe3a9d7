"""A random Qwen-Image of any number of blocks in ComfyUI's fp8 single file, and stored embeddings.

Random numbers and their cast to fp8 would take most of an hour for 20 B weights. Every tensor is
therefore a run of one pool of random numbers, each from a place of its own.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.models.stored_layout import COMFYUI_PREFIX
from ppcl_engine.models.weights import expected_shapes
from ppcl_engine.system.tensor_files import TensorEntry, write_tensor_stream, write_tensors

SPREAD = 0.02  # of weights, as trained ones have it
STRIDE = 7919  # between the places that tensors begin at


def random_model(path: Path, config: dict, seed: int = 0) -> None:
    """Matrices in fp8 without scales, vectors in bf16, as the released qwen_image_fp8 has them."""
    shapes = expected_shapes(QwenImage(), config)
    generator = torch.Generator().manual_seed(seed)
    largest = max(map(math.prod, shapes.values()))
    pool = (SPREAD * torch.randn(largest + STRIDE * len(shapes), generator=generator)).bfloat16()
    narrow = pool.to(torch.float8_e4m3fn)
    entries = [
        _entry(name, shape, narrow if len(shape) > 1 else pool, number * STRIDE)
        for number, (name, shape) in enumerate(shapes.items())
    ]
    write_tensor_stream(path, entries)


def _entry(name: str, shape: tuple[int, ...], pool: torch.Tensor, first: int) -> TensorEntry:
    is_norm = len(shape) == 1 and "norm" in name and name.endswith("weight")

    def read() -> torch.Tensor:
        values = pool[first : first + math.prod(shape)].view(shape)
        return values + 1 if is_norm else values

    return TensorEntry(COMFYUI_PREFIX + name, pool.dtype, shape, read)


def random_embeddings(path: Path, config: dict, captions: int, tokens: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = config["joint_attention_dim"]
    text = torch.randn(captions + 1, tokens, width, generator=generator)
    mask = torch.ones(captions, tokens, dtype=torch.bool)
    write_tensors(path, {"text": text[1:], "empty": text[:1], "mask": mask})
