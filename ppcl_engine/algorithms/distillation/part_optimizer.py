"""AdamW of one part: what is clipped, stepped and averaged together, be it a student, a projection, a
block or the outer layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .sharding import clip, like

BETAS = (0.9, 0.95)
MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}
"""names in files -> AdamW's own"""


class PartOptimizer:
    """The parameters of a part, their AdamW and their exponential moving average.

    The average's decay is min(ema, (1 + step) / (10 + step)), so that early weights are soon
    forgotten; ema 0 averages nothing. A parameter without a gradient in a step stays as it is, so
    each counts its own updates.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], weight_decay: float, ema: float = 0.0):
        self.parameters, self.ema = parameters, ema
        matrices = [p for p in parameters.values() if p.ndim >= 2]
        vectors = [p for p in parameters.values() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=BETAS)
        self.average: dict[str, torch.Tensor] = {}
        self.averaged = 0
        """steps of the training that the average has seen"""
        if ema:
            self.average = {name: p.detach().clone() for name, p in parameters.items()}

    def clip(self) -> float:
        """Shortens the part's gradient to a norm of 1; returns the norm that it had."""
        return clip(self.parameters.values())

    def step(self, learning_rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def average_until(self, step: int) -> None:
        """The average after this many steps of the training: also of those in which the part was
        off."""
        for done in range(self.averaged, step) if self.ema else ():
            decay = min(self.ema, (1 + done) / (10 + done))
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - decay)
        self.averaged = step

    def used(self) -> dict[str, torch.Tensor]:
        """The weights as they are to be used: averaged where there is an average."""
        return self.average or {name: p.detach() for name, p in self.parameters.items()}

    def counts(self) -> dict[str, float]:
        """Updates of each parameter."""
        state = self.adamw.state
        return {
            name: float(state[p]["step"]) if p in state else 0.0
            for name, p in self.parameters.items()
        }

    def moments(self) -> dict[str, torch.Tensor]:
        """`first.<name>` and `second.<name>` of what has been updated."""
        return {
            f"{kind}.{name}": self.adamw.state[parameter][key]
            for name, parameter in self.parameters.items()
            if parameter in self.adamw.state
            for kind, key in MOMENTS.items()
        }

    def load_moments(
        self, moments: Mapping[str, torch.Tensor], counts: Mapping[str, float]
    ) -> None:
        """As `moments` and `counts` gave them; of a parameter without, it begins anew."""
        for name, parameter in self.parameters.items():
            if f"first.{name}" in moments:
                self.adamw.state[parameter] = {
                    "step": torch.tensor(counts[name]),
                    **{
                        key: like(moments[f"{kind}.{name}"], parameter)
                        for kind, key in MOMENTS.items()
                    },
                }
