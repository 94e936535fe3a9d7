"""What a job would take, before it is started: as a text, and as a picture."""

from __future__ import annotations

from pathlib import Path

import torch

from ...ppcl_engine.estimate.budget import Budget, budgets_by_quality
from ...ppcl_engine.jobs.spec import configs, read_spec
from ...ppcl_engine.report.drawings.canvas import BLUE, VERMILION
from ...ppcl_engine.system.numbers import bytes_text, duration_text
from ..pictures import table_card, text_card
from .waiting import in_words_of_widgets


def budget_of(folder: Path) -> Budget:
    """The budget of the job in this folder."""
    return Budget([config for _, config in configs(read_spec(folder), folder)])


def budget_picture(budget: Budget) -> torch.Tensor:
    return table_card(_title(budget), budget.table, VERMILION if budget.refusal else BLUE)


def prepared(folder: Path) -> tuple[torch.Tensor, str]:
    """Picture and text of a job that was not started: what it would take, and with each preset."""
    stages = configs(read_spec(folder), folder)
    budget = budget_of(folder)
    try:
        rows = {"as set": budget} | budgets_by_quality(
            [c for _, c in stages], [s for s, _ in stages]
        )
        text = [f"{folder.name}: not started; {_title(budget)}", *_compared(rows)]
        return budget_picture(budget), "\n".join(text)
    except ValueError as error:  # it is prepared for a device of another machine
        line = in_words_of_widgets(str(error))
        text = f"{folder.name}: not started; what it takes cannot be told here: {line}"
        return text_card(text, BLUE), text


def check_budget(budget: Budget, most_hours: float) -> None:
    """Raises ValueError, in one line, for a job that does not fit this machine or takes too long."""
    if budget.refusal:
        raise ValueError(in_words_of_widgets(budget.refusal))
    if budget.seconds > 3600 * most_hours:
        raise ValueError(
            f"it takes {budget.line}, and most_hours is {most_hours:g}; choose a quicker quality, or raise most_hours"
        )


def _title(budget: Budget) -> str:
    refused = in_words_of_widgets(budget.refusal)
    return f"cannot run here: {refused}" if refused else budget.line


def _compared(rows: dict[str, Budget]) -> list[str]:
    return [
        f"{name}: {duration_text(b.seconds)}, {bytes_text(b.memory)} of memory, {bytes_text(b.files)} of files"
        for name, b in rows.items()
    ]
