"""AdamW of one part: what is clipped, stepped and averaged together, be it a student, a projection, a
block or the outer layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...system.seeds import draw_seed
from .compact_state import is_packed, pack, rounded_at_random, unpack
from .sharding import clip, like

BETAS = (0.9, 0.95)
MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}
"""names in files -> AdamW's own"""
SCALES = {kind: f"{kind}_scale" for kind in MOMENTS}
SIGNED = {"first": True, "second": False}


class PartOptimizer:
    """The parameters of a part, their AdamW and their exponential moving average.

    The average's decay is min(ema, (1 + step) / (10 + step)), so that early weights are soon
    forgotten; ema 0 averages nothing. A parameter without a gradient in a step stays as it is, so
    each counts its own updates.

    compact: between steps moments are in 8 bits and averages in bfloat16.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        weight_decay: float,
        ema: float = 0.0,
        compact: bool = False,
    ):
        self.parameters, self.ema, self.compact = parameters, ema, compact
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
            kept = torch.bfloat16 if compact else None
            self.average = {n: p.detach().to(kept, copy=True) for n, p in parameters.items()}
        self._packed: dict[str, torch.Tensor] = {}
        self._counts: dict[str, float] = {}
        """of parameters whose moments are packed"""

    def clip(self) -> float:
        """Shortens the part's gradient to a norm of 1; returns the norm that it had."""
        return clip(self.parameters.values())

    def step(self, learning_rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self._unpack()
        self.adamw.step()
        self.zero_grad()
        self._pack()

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def average_until(self, step: int) -> None:
        """The average after this many steps of the training: also of those in which the part was
        off."""
        for done in range(self.averaged, step) if self.ema else ():
            decay = min(self.ema, (1 + done) / (10 + done))
            for position, (name, parameter) in enumerate(self.parameters.items()):
                mean = self.average[name].to(parameter).lerp_(parameter, 1 - decay)
                if self.compact:
                    mean = rounded_at_random(mean, draw_seed(done, position))
                self.average[name] = mean
        self.averaged = step

    def used(self) -> dict[str, torch.Tensor]:
        """The weights as they are to be used: averaged where there is an average."""
        weights = {name: p.detach() for name, p in self.parameters.items()}
        return {name: self.average.get(name, p).to(p) for name, p in weights.items()}

    def counts(self) -> dict[str, float]:
        """Updates of each parameter."""
        state = self.adamw.state
        return {
            name: float(state[p]["step"]) if p in state else self._counts.get(name, 0.0)
            for name, p in self.parameters.items()
        }

    def moments(self) -> dict[str, torch.Tensor]:
        """`first.<name>` and `second.<name>` of what has been updated; of codes also their
        `first_scale.<name>`."""
        return self._packed | {
            f"{kind}.{name}": self.adamw.state[parameter][key]
            for name, parameter in self.parameters.items()
            if parameter in self.adamw.state
            for kind, key in MOMENTS.items()
        }

    def load_moments(
        self, moments: Mapping[str, torch.Tensor], counts: Mapping[str, float]
    ) -> None:
        """As `moments` and `counts` gave them; of a parameter without, it begins anew."""
        updated = {n: p for n, p in self.parameters.items() if f"first.{n}" in moments}
        self._counts = {name: counts[name] for name in updated}
        for name, parameter in updated.items():
            for kind in MOMENTS:
                for key in (f"{kind}.{name}", f"{SCALES[kind]}.{name}"):
                    if key in moments:
                        self._packed[key] = moments[key].to(parameter.device)
        if not self.compact:
            self._unpack()

    def _pack(self) -> None:
        """Moments of enough values become codes; AdamW then has no state."""
        if not self.compact:
            return
        moments, counts = self.moments(), self.counts()
        self._counts = {name: count for name, count in counts.items() if count}
        self.adamw.state.clear()
        for name, parameter in self.parameters.items():
            for kind, signed in SIGNED.items():
                moment = moments.get(f"{kind}.{name}")
                if moment is not None and is_packed(parameter.shape):
                    moments[f"{kind}.{name}"], scales = pack(moment, signed)
                    moments[f"{SCALES[kind]}.{name}"] = scales
        self._packed = moments

    def _unpack(self) -> None:
        for name, count in self._counts.items():
            parameter, state = self.parameters[name], {"step": torch.tensor(count)}
            for kind, key in MOMENTS.items():
                moment = self._packed.pop(f"{kind}.{name}")
                scales = self._packed.pop(f"{SCALES[kind]}.{name}", None)
                if scales is not None:
                    moment = unpack(moment, scales, SIGNED[kind])
                state[key] = like(moment.to(parameter.dtype), parameter)
            self.adamw.state[parameter] = state
        self._counts = {}
