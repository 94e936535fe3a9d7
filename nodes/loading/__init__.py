"""From files to tensors by the host's names. Only fold_on_load.py (devices, progress bar) and gguf.py
(another pack's reader) call ComfyUI."""

from __future__ import annotations

from ...ppcl_engine.models.bundle import is_bundle
from ...ppcl_engine.models.stored_layout import open_layout
from ..host.modulations import FOLDS, MakeFold
from ..paths import GGUF
from .from_bundle import bundle_content
from .from_file import file_content
from .request import Content, OpenBase, Request, open_file


def content_of(
    request: Request, open_base: OpenBase = open_file, make_fold: MakeFold | None = None
) -> Content:
    """The tensors that a loader node asks for.

    open_base: opens the base model's file, and any GGUF file; make_fold: gives what stands for folded
    modulations. Raises ValueError, in one line, for files that do not belong together or are not
    what they should be.
    """
    if request.fold not in FOLDS:
        raise ValueError(f"fold {request.fold!r} is unknown; known: {', '.join(FOLDS)}")
    if request.path.suffix == GGUF:
        return file_content(request, make_fold, (open_base(request.path), None))
    if is_bundle(request.path):
        return bundle_content(request, open_base, make_fold)
    return file_content(request, make_fold, open_layout(request.path))
