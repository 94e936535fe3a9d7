"""What each format costs each matrix, in the unit of an interval's damage: the squared error of the
final velocity, relative to the velocity's square. One walk through the model.

The exact error of a linear map on its inputs, tr(D G D^T), compares formats of one matrix, but not one
map with another: it does not say what the rest of the model makes of it. So three things are measured
in each block, with its matrices in the format that hurts most:

    damage(matrix, format) = error(matrix, format) / error(matrix, worst) * share(matrix) * damage(block)

damage(block): of the velocity, with all matrices of this block alone rounded. share: of the changes of
the block's output that rounding its matrices one at a time makes. So the damages of a block add up to
what was measured, and they compare with those of intervals, which are measured the same way.
Memory holds one block, its Gram matrices and, in the store, the states of one batch for each block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ...architectures import BlockState, Inputs, placed
from ...models.layout import Place
from ...models.streaming import StateStore
from ...system.finite import BAD_MODEL, check_finite
from ...system.machine import return_freed_memory
from ...system.progress import Progress
from ..block_states import BlockStates
from ..resampling import squares
from ..sparsity.blocks import watch
from ..sparsity.grams import EVEN, Grams, timestep_weights
from ..sparsity.source import SparsitySource
from .rounding import Layers, Matrix, exact_matrix, numbers_in

Damages = dict[tuple[str, Layers], dict[str, float]]
"""(place's name, layers of a matrix) -> store -> damage"""
MEASURED = 16  # samples at least whose velocity is measured, if there are so many


@dataclass(eq=False)
class Walk:
    """Takes a calibration set through the blocks of a model, one after the other."""

    source: SparsitySource
    inputs: Sequence[Inputs]
    store: StateStore
    dtype: torch.dtype
    device: str

    def __post_init__(self):
        self.architecture = self.source.architecture
        self.outer = self.source.outer(self.dtype, self.device)
        self.embedded = [
            self.architecture.embed(self.outer, placed(row, self.device, self.dtype))
            for row in self.inputs
        ]
        self.weights = [timestep_weights(row["timestep"], EVEN) for row in self.inputs]
        self.shared: dict = {}

    def block(self, place: Place) -> nn.Module:
        block = self.source.block(place, self.dtype, self.device, self.shared)
        check_finite(block.state_dict(), f"{self.source.path}, block {place.name}", BAD_MODEL)
        return block

    def blocks(self, what: str) -> Iterator[tuple[Place, nn.Module, Grams, BlockStates]]:
        """Every block with what its linear maps read, and its inputs. what: the progress bar's
        label."""
        for batch, state in enumerate(self.embedded):
            self.store.put(0, batch, state)
        for number, place in enumerate(
            Progress(self.source.layout.places, desc=what, unit="block")
        ):
            block, states = self.block(place), BlockStates(self.store, number, self.embedded)
            yield place, block, self.watched(block, states, onward=True), states
            states.drop()
            del block
            return_freed_memory()

    def watched(self, block: nn.Module, states: BlockStates, onward: bool = False) -> Grams:
        """The Gram matrices of a block's linear maps. onward: its outputs are the next block's
        inputs."""
        grams = watch(self.architecture.name, block, ())
        for batch, state in states:
            with grams.watching(state, self.weights[batch]):
                after = self.architecture.run_block(block, state)
            if onward:
                states.put(batch, after)
        return grams


@dataclass
class _Branch:
    """The model's states with one block rounded."""

    waits: int
    """index of the block that it goes on at"""
    target: str | int
    """key of the states that it is compared with at the end"""


@dataclass(eq=False)
class BitDamages:
    """Measures every format of every matrix.

    matrices: of the model's places, and of students that could stand in place of some of its blocks.
    """

    walk: Walk
    matrices: Mapping[Place, Sequence[Matrix]]
    refit: bool
    errors: dict[tuple[str, Layers], dict[str, float]] = field(default_factory=dict)
    shares: dict[tuple[str, Layers], float] = field(default_factory=dict)
    branches: dict[str, _Branch] = field(default_factory=dict)

    def measure(self) -> Damages:
        places = self.walk.source.layout.places
        students = [place for place in self.matrices if place not in places]
        for place, block, grams, states in self.walk.blocks("bits"):
            self._advance(place, block)
            self._round(place, block, grams, states)
            for student in students:
                if student.index == place.index:
                    other = self.walk.block(student)
                    self._add(student.name, student.last + 1, len(places), other, states)
                    self._round(student, other, self.walk.watched(other, states), states)
        whole = self._velocity_errors(len(places))
        self.walk.store.clear()
        return {
            (name, layers): {
                store: error / max(errors.values()) * self.shares[name, layers] * whole[name]
                if error
                else 0.0
                for store, error in errors.items()
            }
            for (name, layers), errors in self.errors.items()
        }

    @property
    def _measured(self) -> range:
        """The last batches, as those that variants are measured on."""
        count, first = 0, len(self.walk.inputs)
        while first and count < MEASURED:
            first -= 1
            count += len(self.walk.inputs[first]["timestep"])
        return range(first, len(self.walk.inputs))

    def _advance(self, place: Place, block: nn.Module) -> None:
        for key, branch in self.branches.items():
            if branch.waits <= place.index:
                for batch in self._measured:
                    state = self.walk.store.get(key, batch, self.walk.embedded[batch])
                    after = self.walk.architecture.run_block(block, state)
                    self.walk.store.put(key, batch, after)

    def _add(self, key: str, waits: int, target: str | int, block, states: BlockStates) -> None:
        """A branch that begins with this block."""
        self.branches[key] = _Branch(waits, target)
        for batch in self._measured:
            after = self.walk.architecture.run_block(block, states.of(batch))
            self.walk.store.put(key, batch, after)

    def _round(self, place: Place, block: nn.Module, grams: Grams, states: BlockStates) -> None:
        where, worst = f"block {place.name}", {}
        for matrix in self.matrices[place]:
            exact = exact_matrix(block, grams, matrix.layers, where)
            errors: dict[str, float] = {}
            for store in matrix.sizes:
                found = exact.rounded(store, self.refit)
                if found.error >= max(errors.values(), default=0.0):
                    worst[matrix.layers] = {
                        name: numbers.to(self.walk.dtype) for name, numbers in found.numbers.items()
                    }
                errors[store] = found.error
            self.errors[place.name, matrix.layers] = errors
        changes = self._changes(place, block, worst, states)
        total = sum(changes.values())
        for layers, change in changes.items():
            self.shares[place.name, layers] = change / total if total else 0.0
        student = place not in self.walk.source.layout.places
        target = place.name if student else len(self.walk.source.layout.places)
        with numbers_in(block, worst.values()):
            self._add(_rounded(place.name), place.last + 1, target, block, states)

    def _changes(self, place: Place, block, worst, states: BlockStates) -> dict[Layers, float]:
        """By matrix: the change of the block's output with it alone rounded, relative and squared, the
        sum over the streams that are read behind it."""
        architecture, batch = self.walk.architecture, self._measured[0]
        before = states.of(batch)
        exact = architecture.run_block(block, before)
        streams = architecture.used_streams(self.walk.source.config, place.last)
        changes = {}
        for layers, numbers in worst.items():
            with numbers_in(block, [numbers]):
                after = architecture.run_block(block, before)
            changes[layers] = sum(_relative(after, exact, stream) for stream in streams)
        return changes

    def _velocity_errors(self, last: int) -> dict[str, float]:
        """By place: the squared error of the velocity, relative to that of the whole model."""

        def velocity(key: str | int, batch: int) -> torch.Tensor:
            state = self.walk.store.get(key, batch, self.walk.embedded[batch])
            return self.walk.architecture.finish(self.walk.outer, state).double()

        power = sum(float(squares(velocity(last, batch)).sum()) for batch in self._measured)
        found = {}
        for place in self.matrices:
            key = _rounded(place.name)
            target = self.branches[key].target
            error = sum(
                float(squares(velocity(key, batch) - velocity(target, batch)).sum())
                for batch in self._measured
            )
            check_finite({"velocity": torch.tensor(error)}, f"block {place.name}", BAD_MODEL)
            found[place.name] = error / power if power else 0.0
        return found


def _rounded(place: str) -> str:
    return f"{place}_rounded"


def _relative(after: BlockState, exact: BlockState, stream: str) -> float:
    real = exact.real(stream)[..., None]
    ours, theirs = (state.stream(stream).double() * real for state in (after, exact))
    power = float(theirs.square().sum())
    return float((ours - theirs).square().sum()) / power if power else 0.0


def refitted_blocks(
    walk: Walk, chosen: Mapping[Place, Mapping[Layers, str]]
) -> Iterator[tuple[Place, dict[str, torch.Tensor]]]:
    """By place, in the model's order: the layers' weights, to be stored as `chosen` says."""
    for place, block, grams, _ in walk.blocks("refit"):
        weights: dict[str, torch.Tensor] = {}
        for layers, store in chosen.get(place, {}).items():
            exact = exact_matrix(block, grams, layers, f"block {place.name}")
            weights |= exact.rounded(store, refit=True).weights
        yield place, weights
    walk.store.clear()
