"""What kind of model a file or folder holds, told from its metadata and configuration."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from .bundle import is_bundle
from .released import is_width_pruned
from .standalone import standalone_structure


class Kind(Enum):
    """The kinds, as `ppcl inspect` names them."""

    BUNDLE = "bundle"
    """students and projections of a model, with the plan"""
    STANDALONE = "standalone with teacher indices"
    """one whole variant, in our own layout"""
    RELEASED = "released width-pruned"
    """a folder of the paper's authors"""
    FULL = "full model"
    """anything else: a model of a known architecture, in any layout"""


def kind_of(path: Path) -> Kind:
    """Raises ValueError, naming the file, for one that cannot be read."""
    if is_width_pruned(path):
        return Kind.RELEASED
    if is_bundle(path):
        return Kind.BUNDLE
    return Kind.STANDALONE if standalone_structure(path) else Kind.FULL
