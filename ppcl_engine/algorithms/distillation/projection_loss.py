"""The loss of a projection in training (paper, section 3.4): of its block's output against the
teacher's state there, plus of its own output against what it replaces, relative squared errors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial, reduce

import torch
from torch import nn

from ...architectures import BlockState
from ...architectures.modules import AnyModule
from ...models.assembly import Students
from ...models.layout import Place
from ...models.streaming import Teacher, mixed_precision
from ...models.surgery import project, projection_modules
from ...plan import WidthSite
from ...system.distributed import processes
from ..detection.width_fits import Fit, Pair, counted, own_pair, standing_block
from .losses import relative_mse
from .quantization import quantised_in_training
from .rounds import FreshStates
from .trainable import twin


class ProjectionLoss:
    """The block with its projection, and without it: inputs, outputs and losses on the cached
    batches of a round."""

    def __init__(
        self,
        teacher: Teacher,
        students: Students,
        fit: Fit,
        states: FreshStates,
        maps: nn.ModuleDict,
    ):
        self.teacher, self.students, self.fit = teacher, students, fit
        self.states, self.maps = states, maps
        self.architecture = teacher.architecture
        self.used = teacher.used_streams(fit.place.last)
        self.plain = self._block(fit.place)
        self.source = self._block(fit.source) if fit.source else None
        self.pruned = self._projected()
        self.known: dict[int, tuple[dict[str, Pair], dict | None]] = {}

    def at(self, batch: int, bits: str) -> torch.Tensor:
        """On one batch. `bits`: what weights are rounded to, as `quantised_in_training` names it.

        The maps stand in the block, so both errors have gradients in them.
        """
        if batch not in self.known:
            with torch.no_grad():
                self.known[batch] = self._targets(batch)
        pairs, source = self.known[batch]
        state, target = self.states.state(self.fit.place.index, batch), self._target(batch)
        if source is not None:
            state = replace(state, text=source["text"], modulated_text=source["text_modulated"])
        with quantised_in_training(self.pruned, bits), mixed_precision(self.teacher):
            output = self.architecture.run_block(self.pruned, state)
            outputs = {part: self.maps[part](x) for part, (x, _) in pairs.items()}
        error = partial(relative_mse, whole=processes().sum)
        aligned = [
            error(self._rows(output, s).float(), self._rows(target, s).float())
            for s in self._streams()
        ]
        own = [error(outputs[part].float(), y.float()) for part, (_, y) in pairs.items()]
        return reduce(torch.add, aligned) + reduce(torch.add, own)

    def _streams(self) -> tuple[str, ...]:
        """The streams of the block's output that the projection changes, without a text that nothing
        reads."""
        if self.fit.kind == "text":
            return ("image", "text") if self.fit.steps else ("image",)
        return (self.fit.stream,)

    def _rows(self, state: BlockState, stream: str) -> torch.Tensor:
        rows = (
            counted(self.fit, state, self.used) if stream == self.fit.stream else state.real(stream)
        )
        return state.stream(stream)[rows]

    def _target(self, batch: int) -> BlockState:
        return self.states.state(self.fit.place.last + 1, batch)

    def _targets(self, batch: int) -> tuple[dict, dict | None]:
        """What each map reads and gives; and what the group's source left, where there is one."""
        fit, source, target = self.fit, self._source_seen(batch), self._target(batch)
        _, seen = self.architecture.observe(self.plain, self.states.state(fit.place.index, batch))
        x, y = own_pair(fit, seen, source)
        real = counted(fit, target, self.used)
        pairs = {"map": (x[real], y[real])}
        if fit.steps and source is not None:
            moved = target.text.float() - source["text"].float()
            pairs["step"] = (source["text"][real], moved[real])
        return pairs, source

    def _source_seen(self, batch: int) -> dict[str, torch.Tensor] | None:
        """What the group's source left."""
        if self.fit.source is None or self.source is None:
            return None
        state = self.states.state(self.fit.source.index, batch)
        after, seen = self.architecture.observe(self.source, state)
        return {"text": after.text, "text_modulated": seen["text_modulated"]}

    def _block(self, place: Place) -> AnyModule:
        block = None if place.interval else self.teacher.block(place.index)
        return standing_block(self.teacher, self.students, place, block)

    def _projected(self) -> nn.Module:
        """A frozen block whose maps are the ones in training."""
        fit = self.fit
        ffn = (
            ()
            if fit.kind == "text"
            else (WidthSite(block=fit.place.index, kind=fit.kind, form=fit.form),)
        )
        source = fit.source.index if fit.source else None
        place = replace(fit.place, ffn=ffn, text_source=source, steps_text=fit.steps)
        block = project(self.architecture, twin(self.plain), place, {})
        names = self.architecture.projection_names[fit.kind]
        for part in projection_modules(self.architecture, block, fit.kind):
            parent, _, child = names[part].rpartition(".")
            setattr(block.get_submodule(parent), child, self.maps[part])
        return block
