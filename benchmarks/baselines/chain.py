"""Distillation of a whole chain of blocks on the final velocity, and the budget that every method
spends.

Every batch is a function of (seed, step), so the same call ends in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ppcl_engine.algorithms.distillation.losses import velocity_loss
from ppcl_engine.algorithms.distillation.trainer import Trainer, cosine_schedule
from ppcl_engine.architectures import BlockState, Inputs
from ppcl_engine.data.calibration import CalibrationSet
from ppcl_engine.models.streaming import Teacher, embed_with, run_chain, teacher_velocity
from ppcl_engine.system.seeds import draw_seed

FORWARD, FORWARD_BACKWARD = 1, 3
WARM_UP = 16
WEIGHT_DECAY = 0.02

ExtraLoss = Callable[[list[BlockState], list[BlockState]], torch.Tensor]
"""(student's states, teacher's states) -> what to add to the loss. Entry k is the input of the
chain's block k (the student's by position, the teacher's by index), the last one the state behind
the last block."""


@dataclass
class Budget:
    """Block passes that a method may spend: the forward of one block on one batch is 1, its
    backward 2.

    A block that gradients flow through costs both, also when its own weights are frozen.
    """

    total: int
    spent: int = 0

    @property
    def left(self) -> int:
        return self.total - self.spent

    def spend(self, passes: int) -> None:
        """Raises ValueError when that much is not left."""
        if passes > self.left:
            raise ValueError(
                f"{passes} block passes are needed and {self.left} of {self.total} are left; raise the budget"
            )
        self.spent += passes

    def steps_for(self, cost_per_step: int) -> int:
        return self.left // cost_per_step


def step_cost(num_blocks: int, kept: int, frozen: int = 0) -> int:
    """Block passes of one step of `distil_velocity`; `frozen`: blocks in front of everything that
    is trained."""
    return FORWARD * (num_blocks + frozen) + FORWARD_BACKWARD * (kept - frozen)


def step_inputs(calibration: CalibrationSet, seed: int, step: int) -> Inputs:
    """The batches in turn, each time with new noise and timesteps."""
    return calibration.fresh(step % len(calibration), draw_seed(seed, step))


def distil_loss(
    teacher: Teacher,
    blocks: Iterable[nn.Module],
    outer: nn.Module,
    inputs: Inputs,
    extra_loss: ExtraLoss | None = None,
) -> torch.Tensor:
    """Relative error of the chain's velocity, plus `extra_loss` of the states on the way (kept only
    if it is given)."""
    teacher_states, student_states = (None, None) if extra_loss is None else ([], [])
    with torch.no_grad():
        target = teacher_velocity(teacher, inputs, teacher_states)
    state = embed_with(teacher, outer, inputs)
    loss = velocity_loss(
        run_chain(teacher.architecture, outer, blocks, state, student_states), target
    )
    return loss if extra_loss is None else loss + extra_loss(student_states, teacher_states)


def distil_velocity(
    teacher: Teacher,
    blocks: Sequence[nn.Module],
    outer: nn.Module,
    calibration: CalibrationSet,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    trainable: Iterable[nn.Parameter] | None = None,
    extra_loss: ExtraLoss | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Trains the chain in place; returns the loss of every step. `progress(steps done, loss)` after
    each.

    `trainable`: parameters of `blocks` and `outer`, all of them by default; what is trained must
    not be the teacher's own. Raises trainer.Diverged when the loss is not finite.
    """
    chain = nn.ModuleList([*blocks, outer]).requires_grad_(False)
    trainer = Trainer(
        nn.ParameterList(chain.parameters() if trainable is None else trainable), WEIGHT_DECAY
    )
    for step in range(steps):
        loss = distil_loss(teacher, blocks, outer, step_inputs(calibration, seed, step), extra_loss)
        trainer.update(
            loss,
            cosine_schedule(step, steps, learning_rate, WARM_UP),
            "distillation on the velocity",
        )
        if progress is not None:
            progress(step + 1, trainer.losses[-1])
    chain.requires_grad_(False)
    return trainer.losses
