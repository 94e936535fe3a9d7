"""What a loader node is asked for, and what it gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...ppcl_engine.architectures.folded import Folding
from ...ppcl_engine.models.stored_layout import open_layout
from ...ppcl_engine.plan import PruningPlan, Variant
from ..host import HOSTS
from ..host.modulations import OFF, Fold, Modulations
from ..host.quantised import Quantised
from .stored import Joined, Stored

SMALLEST, AUTO, AS_NUMBERED, BY_INTERVALS = "smallest", "auto", "as numbered", "by intervals"
RELEASES = {name: known for host in HOSTS for name, known in host.presets.items()}
PRESETS = (AUTO, AS_NUMBERED, *RELEASES, BY_INTERVALS)

Locations = dict[str, Stored | Joined | Quantised]
"""the host's name for a tensor -> where it is in a file"""
OpenBase = Callable[[Path], dict[str, tuple[object, str]]]
"""path -> name of each tensor -> (open file, name in it), as `open_layout` gives them"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a loader node is asked for. Paths were looked up in lists, never taken from a widget."""

    path: Path
    base: Path | None = None
    """of a bundle: its base model; of a folded table: the file it was folded from"""
    variant: str = SMALLEST
    """of a bundle"""
    switchable: bool = True
    """of a bundle: load all variants, not just this one"""
    preset: str = AUTO
    """of a released model: which of the teacher's blocks its blocks are"""
    intervals: str = ""
    """for the preset BY_INTERVALS"""
    legacy_text: bool = False
    """of a released model: its text projections are stored as P instead of P - 1"""
    fold: str = OFF
    """form in which modulations are folded while loading"""


@dataclass
class Content:
    """What a loader node gets."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """for the host's loader, marks included"""
    metadata: dict[str, str] = field(default_factory=dict)
    """for the host's loader: of the file that most tensors are from, without entries that the
    tensors now replace"""
    bytes_read: int = 0
    """size of the tensors that were read"""
    plan: PruningPlan | None = None
    """of a bundle"""
    variant: Variant | None = None
    """of a bundle"""
    notes: tuple[str, ...] = ()
    """for the user, a line each"""
    later: Modulations | None = None
    """what a table of modulations is filled from when a schedule is sampled"""


def variant_in(plan: PruningPlan, name: str) -> Variant:
    """The variant that a widget names; SMALLEST is a choice even where none has that name."""
    named = any(variant.name == name for variant in plan.variants)
    return plan.variant(None if name == SMALLEST and not named else name)


def open_file(path: Path) -> dict[str, tuple[object, str]]:
    return open_layout(path)[0]


def with_fold(content: Content, fold: Fold | None) -> Content:
    """The content together with what stands for its folded modulations, if they are folded."""
    if fold is not None:
        content.tensors |= fold.tensors
        content.bytes_read += fold.bytes_read
        content.notes, content.later = (*content.notes, *fold.notes), fold.later
    return content


def check_not_folded(folding: Folding | None, request: Request) -> None:
    if folding is not None:
        raise ValueError(f"{request.path.name} is folded already ({folding.form}); set fold to off")
