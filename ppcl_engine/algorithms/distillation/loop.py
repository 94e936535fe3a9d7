"""The one training loop: updates up to a step, with a bar, and a save when Ctrl-C asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ...system.interruption import Stopped
from ...system.progress import Progress
from .trainer import cosine_schedule

Work = TypeVar("Work", contravariant=True)


class Rates(Protocol):
    """The settings of a learning rate's course."""

    @property
    def learning_rate(self) -> float: ...

    @property
    def warm_up(self) -> int: ...


class Trains(Protocol[Work]):
    """What the loop does a step of."""

    step: int
    losses: list[float]

    def update(self, work: Work, learning_rate: float, where: str, /) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Session:
    """What all trainings of a stage share."""

    rates: Rates
    steps: int
    """updates of one training from its beginning to its end, over which the rate falls"""
    progress: Progress
    stop_asked: Callable[[], bool]


def train_until(
    end: int,
    trainer: Trains[Work],
    work_at: Callable[[int], Work],
    name: str,
    session: Session,
    save: Callable[[], None],
) -> None:
    """Updates until `end` of them are done in all. `work_at(step)`: the loss before that
    update, or what gives it.

    Raises Stopped, after `save()`, when it is asked to stop before the last step of the training;
    Diverged (a ValueError) for a loss or gradient that is not finite.
    """
    while trainer.step < end:
        rates = session.rates
        rate = cosine_schedule(trainer.step, session.steps, rates.learning_rate, rates.warm_up)
        trainer.update(work_at(trainer.step), rate, name)
        session.progress.update()
        session.progress.set_postfix_str(f"{name} loss {trainer.losses[-1]:.3g}", refresh=False)
        if session.stop_asked() and trainer.step < session.steps:
            save()
            raise Stopped(
                f"stopped at step {trainer.step} of {name}; saved. Run the same command to go on"
            )
