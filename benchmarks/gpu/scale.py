"""How large everything is that is measured: the published model, or a tiny one for a quick run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.models.weights import full_parameters

from ..shared.teachers import WIDE

PIXELS_PER_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the stages that train, and detect, are run on: a file of few blocks of the real width."""

    side: int
    """pixels"""
    text_tokens: int
    batch: int
    """samples that go through a block at once"""
    batches: int
    """of the calibration set"""
    distilled: tuple[int, str]
    """blocks of distil-depth's model, and its intervals"""
    tuned: tuple[int, str]
    """the same for polish and finetune"""
    steps: int
    """of the plain recipe"""
    tuning_steps: int
    """of polish and finetune"""
    updates: int
    """of each student, in one round of distil-depth"""
    detected: tuple[int, int]
    """blocks of the two models from which the time of detect is extrapolated"""
    longest: int
    """interval that detect considers, in blocks"""


@dataclass(frozen=True, kw_only=True)
class Scale:
    config: dict
    """of the model with all blocks"""
    forms: tuple[str, ...]
    """names of the forms whose step is timed, the full model first"""
    sides: tuple[int, ...]
    """pixels of the pictures, the largest first"""
    text_tokens: int
    warm_up: int
    repeats: int
    backend: str
    """of torch.compile"""
    compiled: tuple[str, ...]
    """names of the forms that are timed with torch.compile and without"""
    sparse_blocks: int
    """of the model that is timed with 2:4 weights and without"""
    training: Training

    @cached_property
    def parameters(self) -> int:
        """How many the model with all blocks has."""
        return full_parameters(QwenImage(), self.config)


FULL = Scale(
    config=QwenImage.model_configs["qwen_image"],
    forms=("full", "41 blocks", "35 blocks", "10 B", "folded", "int8"),
    sides=(1328, 1024),
    text_tokens=256,
    warm_up=3,
    repeats=9,
    backend="inductor",
    compiled=("full", "10 B", "int8"),
    sparse_blocks=4,
    training=Training(
        side=1024,
        text_tokens=128,
        batch=2,
        batches=4,
        distilled=(8, "1-3 5-7"),
        tuned=(6, "1-2 4-5"),
        steps=8,
        tuning_steps=3,
        updates=60,
        detected=(6, 12),
        longest=8,
    ),
)
TINY = {**WIDE, "attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": [4, 14, 14]}
QUICK = Scale(
    config={**TINY, "num_layers": 60},
    forms=("full", "10 B", "folded", "int8"),
    sides=(64,),
    text_tokens=4,
    warm_up=0,
    repeats=1,
    backend="eager",
    compiled=("35 blocks",),
    sparse_blocks=1,
    training=Training(
        side=64,
        text_tokens=4,
        batch=2,
        batches=2,
        distilled=(4, "1-2"),
        tuned=(4, "1-2"),
        steps=1,
        tuning_steps=1,
        updates=2,
        detected=(3, 4),
        longest=3,
    ),
)
