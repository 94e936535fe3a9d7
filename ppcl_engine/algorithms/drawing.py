"""Batches of pictures drawn together, block by block: a denoising step reads the model's file once
for all of them.

Drawn one after the other, each forward would read the whole file. The arithmetic is that of
`data.sampling.draw`, so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..architectures import BlockState
from ..data import flow
from ..data.sampling import Prompts, guided_velocity, inputs_of, texts_of
from ..models.streaming import Teacher, check_states, state_of, streams_of
from ..system.finite import checked_velocity
from ..system.progress import Progress


@dataclass(kw_only=True)
class Drawing:
    """A batch on its way from noise to pictures."""

    prompts: Prompts
    """of the batch"""
    grid: torch.Tensor
    """of the pictures, as in `Inputs`"""
    tokens: torch.Tensor
    """[n, tokens, channels], as they are now"""
    kept_steps: torch.Tensor
    """[n]: the step at which each picture's state is kept"""
    kept: torch.Tensor = field(init=False)
    """[n, tokens, channels]: each picture at its step"""
    times: torch.Tensor = field(init=False)
    """[n]: the t of these states"""

    def __post_init__(self):
        self.kept, self.times = torch.zeros_like(self.tokens), torch.zeros(len(self.tokens))

    def seen(self, step: int, x: torch.Tensor, t: float) -> None:
        rows = self.kept_steps == step
        self.kept[rows], self.times[rows] = x[rows], t

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is needed to go on."""
        return {"tokens": self.tokens, "kept": self.kept, "times": self.times}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tokens, self.kept, self.times = (tensors[name] for name in ("tokens", "kept", "times"))


@torch.no_grad()
def draw_together(
    teacher: Teacher,
    drawings: list[Drawing],
    steps: int,
    guidance: float,
    first: int,
    progress: Progress,
    stepped: Callable[[int], None],
) -> None:
    """Takes the drawings from step `first` to the end; calls `stepped(steps done)` after each step.

    `progress` counts blocks. Raises ValueError naming the block from which the model is not finite.
    """
    schedules = [drawing.prompts.timesteps(steps, drawing.tokens.shape[1]) for drawing in drawings]
    for step in range(first, steps):
        now = [schedule[step] for schedule in schedules]
        for drawing, t in zip(drawings, now, strict=True):
            drawing.seen(step, drawing.tokens, t)
        velocities = _velocities(teacher, drawings, now, guidance, progress)
        for drawing, velocity, schedule in zip(drawings, velocities, schedules, strict=True):
            checked_velocity(velocity, f"the model at t = {schedule[step]:.3g}")
            drawing.tokens = flow.euler_step(
                drawing.tokens, velocity, schedule[step], schedule[step + 1]
            )
        stepped(step + 1)


def states_of(teacher: Teacher, drawing: Drawing, t: float, guidance: float) -> list[BlockState]:
    """Embedded states: with the captions, and with the empty caption where guidance needs both."""
    texts = texts_of(
        teacher.architecture, teacher.config, drawing.prompts, len(drawing.tokens), guidance
    )
    times = torch.full((len(drawing.tokens),), t)
    return [teacher.embed(inputs_of(drawing.tokens, times, text, drawing.grid)) for text in texts]


def _velocities(
    teacher: Teacher, drawings: list[Drawing], now: list[float], guidance: float, progress: Progress
) -> list[torch.Tensor]:
    rest = "cpu" if teacher.streamed else None
    states = [
        states_of(teacher, drawing, t, guidance) for drawing, t in zip(drawings, now, strict=True)
    ]
    streams = [[streams_of(state, rest) for state in row] for row in states]
    likes = [
        [state.with_streams(state.image[:0], state.text[:0]) for state in row] for row in states
    ]
    del states
    for index, block in teacher.walk(0, teacher.num_blocks - 1):
        for row, like in zip(streams, likes, strict=True):
            for number, stream in enumerate(row):
                before = state_of(stream, like[number])
                check_states(index, before)
                row[number] = streams_of(teacher.architecture.run_block(block, before), rest)
        progress.update()
    guided_velocities = []
    for drawing, row, like in zip(drawings, streams, likes, strict=True):
        ends = [state_of(stream, template) for stream, template in zip(row, like, strict=True)]
        for end in ends:
            check_states(teacher.num_blocks, end)
        velocities = [
            teacher.architecture.finish(teacher.outer, state).float().cpu() for state in ends
        ]
        guided_velocities.append(guided_velocity(velocities, guidance, drawing.prompts))
    return guided_velocities
