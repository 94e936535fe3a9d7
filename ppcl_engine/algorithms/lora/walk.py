"""The teacher with a LoRA, at several strengths, and without it, walked side by side through the
blocks: every block is read once for all batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...architectures import BlockState
from ...data.calibration import CalibrationSet
from ...models.layout import Place
from ...models.lora_files import LoraFile, ReadTensor
from ...models.streaming import StateStore, Teacher, mixed_precision, room_for_states
from ..distillation.round_cache import IN_MEMORY
from .fit import Goal, PlaceFit
from .pairs import Pairs, changed

STRENGTHS = (1.0, 0.5, 1.2, 0.8)
"""at which a LoRA is fitted, in turn; the first few batches have the first of them"""
FLOOR = 1e-8  # of a stream's own power: a smaller change counts as none


@dataclass(frozen=True)
class Item:
    """A batch, and the strength that the LoRA has on it."""

    batch: int
    strength: float


def items_of(batches: int) -> list[Item]:
    """Every batch once, and as many more as it takes to have every strength."""
    count = max(batches, len(STRENGTHS))
    return [Item(n % batches, STRENGTHS[n % len(STRENGTHS)]) for n in range(count)]


class TwoTeachers:
    """States of both at the block that the walk has come to, and at the one before a place."""

    def __init__(
        self,
        teacher: Teacher,
        lora: LoraFile,
        calibration: CalibrationSet,
        base: ReadTensor,
        folder: Path | None,
    ):
        self.teacher, self.lora, self.base = teacher, lora, base
        self.items = items_of(len(calibration))
        self.store = StateStore(folder, room=room_for_states(IN_MEMORY))
        inputs = [calibration.inputs(batch) for batch in range(len(calibration))]
        self.plain = [teacher.embed(rows) for rows in inputs]
        self.with_lora = list[BlockState]()
        for item in self.items:
            with changed(teacher.outer, "", lora, item.strength, base):
                self.with_lora.append(teacher.embed(inputs[item.batch]))
        for batch, state in enumerate(self.plain):
            self.store.put("plain", batch, state)
        for number, state in enumerate(self.with_lora):
            self.store.put("lora", number, state)

    @torch.no_grad()
    def pass_by(self, place: Place) -> None:
        """On to behind the place; what it reads is kept until the next call."""
        for batch, like in enumerate(self.plain):
            self.store.put("plain before", batch, self.store.get("plain", batch, like))
        for number, like in enumerate(self.with_lora):
            self.store.put("lora before", number, self.store.get("lora", number, like))
        for index, block in self.teacher.walk(place.index, place.last):
            prefix = self.teacher.architecture.block_prefix(self.teacher.config, index)
            for batch, like in enumerate(self.plain):
                self._step(block, "plain", batch, like)
            for strength in STRENGTHS:
                with changed(block, prefix, self.lora, strength, self.base):
                    for number, item in enumerate(self.items):
                        if item.strength == strength:
                            self._step(block, "lora", number, self.with_lora[number])

    def _step(self, block: torch.nn.Module, key: str, number: int, like: BlockState) -> None:
        after = self.teacher.architecture.run_block(block, self.store.get(key, number, like))
        self.store.put(key, number, after)

    def source(self, place: Place, number: int) -> BlockState:
        """What a place of the pruned model reads with the LoRA, of an item."""
        state = self.store.get("lora before", number, self.with_lora[number])
        return self._with_text(place, f"lora text {place.text_source}", number, state)

    def plain_source(self, place: Place, batch: int) -> BlockState:
        state = self.store.get("plain before", batch, self.plain[batch])
        return self._with_text(place, f"plain text {place.text_source}", batch, state)

    def _with_text(self, place: Place, key: str, number: int, state: BlockState) -> BlockState:
        """A block of a text group reads the text of the group's source."""
        if place.text_source is None:
            return state
        text = self.store.get(key, number, state)
        return replace(state, text=text.text, modulated_text=text.modulated_text)

    @torch.no_grad()
    def want(self, fit: PlaceFit) -> list[dict[str, float]]:
        """Stores what a place is to give with the LoRA. Returns the power of each item's change."""
        place, powers = fit.work.place, []
        for batch in range(len(self.plain)):
            with mixed_precision(self.teacher):
                alone = self.teacher.architecture.run_block(
                    fit.block, self.plain_source(place, batch)
                )
            self.store.put("student", batch, alone)
        for number, (item, like) in enumerate(zip(self.items, self.with_lora, strict=True)):
            alone = self.store.get("student", item.batch, like)
            before = self.store.get("plain", item.batch, like)
            after = self.store.get("lora", number, like)
            image, text = (
                alone.stream(s).float() + after.stream(s).float() - before.stream(s).float()
                for s in ("image", "text")
            )
            self.store.put("wanted", number, after.with_streams(image, text))
            powers.append({s: _power(after, before, s) for s in fit.streams})
        return powers

    def goals(self, fit: PlaceFit, powers: list[dict[str, float]]) -> Iterator[Goal]:
        for number in range(len(self.items)):
            yield self.goal(fit, powers, number)

    def goal(self, fit: PlaceFit, powers: list[dict[str, float]], number: int) -> Goal:
        like = self.with_lora[number]
        return Goal(
            strength=self.items[number].strength,
            source=self.source(fit.work.place, number),
            wanted=self.store.get("wanted", number, like),
            power=powers[number],
        )

    @torch.no_grad()
    def publish(self, fit: PlaceFit, pairs: Pairs) -> None:
        """Keeps the text that a group behind the place reads."""
        place, run = fit.work.place, self.teacher.architecture.run_block
        for batch in range(len(self.plain)):
            after = run(fit.block, self.plain_source(place, batch))
            self.store.put(f"plain text {place.index}", batch, after)
        for number, item in enumerate(self.items):
            source = self.source(place, number)
            after = fit.run(pairs, Goal(item.strength, source, source, {}))
            self.store.put(f"lora text {place.index}", number, after)


def _power(after: BlockState, before: BlockState, stream: str) -> float:
    now = after.real_tokens(stream).double()
    change = now - before.real_tokens(stream).double()
    return max(float(change.square().sum()), FLOOR * float(now.square().sum()))
