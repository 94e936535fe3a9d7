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

GGUF = ".gguf"
SMALLEST, AUTO, AS_NUMBERED, BY_INTERVALS = "smallest", "auto", "as numbered", "by intervals"
RELEASES = {name: known for host in HOSTS for name, known in host.presets.items()}
PRESETS = (AUTO, AS_NUMBERED, *RELEASES, BY_INTERVALS)

Places = dict[str, Stored | Joined | Quantised]
"""the host's name of a tensor -> where it is"""
OpenBase = Callable[[Path], dict[str, tuple[object, str]]]
"""path -> name of each tensor -> (open file, name in it), as `open_layout` gives them"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a loader node is asked for. Paths are the node pack's own findings, never a widget's
    text."""

    path: Path
    base: Path | None = None
    variant: str = SMALLEST
    switchable: bool = True
    preset: str = AUTO
    intervals: str = ""
    legacy_text: bool = False
    fold: str = OFF


@dataclass
class Content:
    """tensors: for the host's loader, marks included. metadata: of the file that most of them are
    from, for it too, but what the tensors say by now. bytes_read: of tensors. variant, plan: of a
    bundle. later: what a table of modulations is filled from when a schedule is known."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    bytes_read: int = 0
    plan: PruningPlan | None = None
    variant: Variant | None = None
    notes: tuple[str, ...] = ()
    later: Modulations | None = None


def open_file(path: Path) -> dict[str, tuple[object, str]]:
    return open_layout(path)[0]


def with_fold(content: Content, fold: Fold | None) -> Content:
    if fold is not None:
        content.tensors |= fold.tensors
        content.bytes_read += fold.bytes_read
        content.notes, content.later = (*content.notes, *fold.notes), fold.later
    return content


def check_not_folded(folding: Folding | None, request: Request) -> None:
    if folding is not None:
        raise ValueError(f"{request.path.name} is folded already ({folding.form}); set fold to off")
