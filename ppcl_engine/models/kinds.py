"""The four kinds of files and folders that hold a model, and the one that opens any of them.

Whatever is opened has its `kind` (as `ppcl inspect` names it), path, architecture, config and
num_blocks; all but a bundle have a `layout` and read tensors by diffusers' names.
"""

from __future__ import annotations

from pathlib import Path

from .bundle import Bundle, is_bundle
from .released import Released, is_width_pruned
from .standalone import Standalone, is_standalone
from .weights import Weights


def open_file(
    path: Path, legacy_txt_proj: bool = False
) -> Bundle | Standalone | Released | Weights:
    """Raises ValueError, naming the file, for one that cannot be read or lacks tensors.

    legacy_txt_proj: see `Released`; other kinds have no use for it.
    """
    if is_width_pruned(path):
        return Released(path, legacy_txt_proj)
    return open_convertible(path)


def open_convertible(path: Path) -> Bundle | Standalone | Weights:
    """The same for those that can be folded and made sparse. Raises ValueError for a folder of the
    paper's authors, which has to be imported first."""
    if is_bundle(path):
        return Bundle(path)
    return Standalone(path) if is_standalone(path) else Weights(path)
