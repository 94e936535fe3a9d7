"""What a plan is made of: intervals, width sites and variants.

Indices are the teacher's, from 0. An interval [first, last] includes both ends: these blocks are
replaced by one student (paper, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ..system.schemas import STRICT, BlockIndex, Count, Finite

FORMS = ("paper", "gated")
SITE_KINDS = ("text", "ffn_image", "ffn_text", "ffn_joint")
FULL, ALL = "full", "all"
NUMBER = "[0-9]{1,6}"  # not \d, which takes the digits of all scripts
NAME = rf"({NUMBER}-{NUMBER}|[a-z_]+:{NUMBER}(-{NUMBER})?)"
PlaceName = Annotated[str, Field(pattern=rf"^{NUMBER}(-{NUMBER})?\z")]
VariantName = Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f\x7f]{1,255}\z")]
"""part of the name of a file, where the variant is tuned"""
Correction = Annotated[str, Field(pattern=r"^(none|affine|[1-9][0-9]{0,4})\z")]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Blocks first..last, which one student replaces."""

    __pydantic_config__ = STRICT

    first: BlockIndex
    """the first block"""
    last: BlockIndex
    """the last block"""
    score: Finite | None = None
    """damage on the final velocity (relative, squared), when measured"""
    stability: Finite | None = None
    """share of bootstrap resamples that choose exactly this interval"""
    parameters: Count | None = None
    """of its student, correction included"""
    correction: Correction = "none"
    """ "none", "affine", or the rank of a low-rank one"""

    @property
    def name(self) -> str:
        return f"{self.first}-{self.last}"

    @property
    def removed(self) -> int:
        return self.last - self.first

    @property
    def blocks(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True, kw_only=True)
class WidthSite:
    """A part of a block that a projection replaces."""

    __pydantic_config__ = STRICT

    block: BlockIndex
    """teacher index"""
    kind: str
    """one of SITE_KINDS"""
    form: str = "paper"
    """of an FFN: "paper" (x + P x) or "gated" (P inside norm, modulation and gate), of those that
    the architecture has"""
    score: Finite | None = None
    """its damage, when measured"""
    fitted: tuple[PlaceName, ...] = ()
    """names of blocks and students with a projection of their own, besides what stands there with
    all intervals on; "52" is the teacher's block"""

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.block}"

    @property
    def sites(self) -> tuple[WidthSite, ...]:
        """Itself: a switch of one site, as a TextGroup is one of several."""
        return (self,)


@dataclass(frozen=True)
class TextGroup:
    """Neighbouring text sites. They switch together, because a block restored in between would step
    the text."""

    sites: tuple[WidthSite, ...]
    kind = "text"
    """of every site in it, as `WidthSite.kind`"""

    @property
    def first(self) -> int:
        return self.sites[0].block

    @property
    def last(self) -> int:
        return self.sites[-1].block

    @property
    def name(self) -> str:
        return f"text:{self.first}-{self.last}"

    @property
    def form(self) -> str:
        return self.sites[0].form

    @property
    def score(self) -> float | None:
        return self.sites[0].score


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A named set of intervals and sites that are switched on."""

    __pydantic_config__ = STRICT

    name: VariantName
    """unique in the plan"""
    intervals: tuple[str, ...] = ()
    """names of those that are on"""
    sites: tuple[str, ...] = ()
    """names of the sites and text groups that are on"""
    parameters: Count | None = None
    """of the variant's model"""
    bytes: Count | None = None
    """of its file"""
    flops: Finite | None = None
    """of one forward at the plan's reference size"""
    milliseconds: Finite | None = None
    """of one forward, when measured"""
    damage: Finite | None = None
    """relative squared velocity error, when measured"""
    tuned: bool = False
    """it has weights of its own (fine-tuned)"""
