"""What pictures are worth: structural similarity, and what a reader reads in them where a model has one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .codecs import Codec, TableCodec, open_codec
from .config_files import EvaluateConfig
from .run import resolve_device


def ssim(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean structural similarity [n] of pictures [n, 3, H, W] in [0, 1], Gaussian window of 11 with
    deviation 1.5 (Wang et al. 2004, equation 13)."""
    channels = ours.shape[1]
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(channels, 1, 11, 11)
    x, y = ours.double(), theirs.double()

    def blurred(z: torch.Tensor) -> torch.Tensor:
        return F.conv2d(z, window, groups=channels)

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (value / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(1)


@dataclass(frozen=True)
class Reading:
    """A model's codec and, where its pictures have known content, captions for it and their score."""

    codec: Codec
    has_reader: bool

    def captions(self, count: int, seed: int) -> list[str]:
        """Raises ValueError for a model whose captions are not known."""
        if not self.has_reader:
            raise ValueError("evaluate needs captions for this model; give --prompts, a text file with one a line")
        from .demo.task import random_captions

        generator = torch.Generator().manual_seed(seed * 1_000_003)
        return [caption.text() for caption in random_captions(count, generator)]

    def score(self, pictures: torch.Tensor, texts: list[str]) -> dict[str, torch.Tensor]:
        """Per picture: character, shape and colours right; empty for a model without a reader."""
        if not self.has_reader:
            return {}
        from .demo.reader import load_reader, read, score
        from .demo.task import parse_caption

        return score(read(load_reader(), pictures), [parse_caption(text) for text in texts])


def reader_of(config: EvaluateConfig, model: Path) -> Reading:
    codec = open_codec(model, resolve_device(config.device))
    return Reading(codec, isinstance(codec, TableCodec))
