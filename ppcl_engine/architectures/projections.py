"""The small modules that stand inside a width-pruned block: the block's own forward then runs on them.

The mathematics of the method's width stage (paper, section 3.4) is here once, for training, export and
inference; which sub-module of a block each replaces is the architecture's business.
"""

from __future__ import annotations

import torch
from torch import nn


class SharedText:
    """Carries the modulated text of a text group's source block to the group's projections, in one forward.

    The source writes it every time before the group's blocks read it; it holds no weights.
    """

    value: torch.Tensor | None = None


class PaddedModulation(nn.Sequential):
    """A modulation cut to its first half (3 d: attention's shift, scale, gate), as the paper's FFN form needs.

    The second half reads shift 0, scale 0, gate 1, so that a block adds P(x) of the very stream to it.
    Keeps the names of the modulation's own tensors.
    """

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        first = super().forward(conditioning)
        zeros = torch.zeros_like(first[..., : first.shape[-1] // 3])
        return torch.cat([first, zeros, zeros, zeros + 1], dim=-1)


class FixedModulation(nn.Module):
    """In place of a text modulation whose stream does not move: all zeros, or the FFN's gate 1 where it steps."""

    def __init__(self, width: int, steps: bool):
        super().__init__()
        self.width, self.steps = width, steps

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        zeros = conditioning.new_zeros(*conditioning.shape[:-1], 5 * self.width)
        gate = conditioning.new_full((*conditioning.shape[:-1], self.width), float(self.steps))
        return torch.cat([zeros, gate], dim=-1)


class ProjectedText(nn.Module):
    """txt_modulated_j = P_j(txt_modulated_a) + txt_modulated_a, a being the last full block before the group."""

    def __init__(self, projection: nn.Linear, source: SharedText):
        super().__init__()
        self.projection, self.source = projection, source

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        modulated = self.source.value
        assert modulated is not None, "the block before a text group has to run before the group"
        return self.projection(modulated) + modulated


class Nothing(nn.Module):
    """Zeros in the shape of its input: an output that a gate of zero would drop anyway."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)
