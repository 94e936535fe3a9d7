"""What polish and finetune keep of a parameter that they train, and how often it takes its turn."""

from __future__ import annotations

import torch

from ..algorithms.distillation.compact_state import BLOCK, COMPACT
from ..settings.prune_settings import FinetuneConfig, PolishConfig
from .counts import FP32


def bytes_a_parameter(config: PolishConfig | FinetuneConfig) -> float:
    """Bytes outside of its turn and in a file: its weight, two moments, and an average where there
    is one."""
    if config.optimizer_state == COMPACT:
        return FP32 + 2 * (1 + FP32 / BLOCK) + (torch.bfloat16.itemsize if config.ema else 0)
    return FP32 * (4 if config.ema else 3)


def share_of_steps(config: PolishConfig | FinetuneConfig) -> float:
    """How much of what is trained takes part in a step, in the mean."""
    return (1 + config.all_on) / 2 if isinstance(config, PolishConfig) else 1
