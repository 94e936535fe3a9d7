"""What a plan is made of: intervals, width sites and variants.

Indices are the teacher's, from 0. An interval [first, last] includes both ends: these blocks
are replaced by one student (paper, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ..system.schemas import STRICT, BlockIndex, Count, Finite

FORMS = ("paper", "gated")
FORMS_OF = {"text": FORMS, "ffn_image": FORMS, "ffn_text": FORMS, "ffn_joint": ("gated",)}
SITE_KINDS = tuple(FORMS_OF)
FULL, ALL = "full", "all"
NUMBER = "[0-9]{1,6}"  # not \d, which takes the digits of all scripts
NAME = rf"({NUMBER}-{NUMBER}|[a-z_]+:{NUMBER}(-{NUMBER})?)"
Correction = Annotated[str, Field(pattern=r"^(none|affine|[1-9][0-9]{0,4})\z")]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Blocks first..last. `score`: damage on the final velocity (relative, squared) when measured;
    `stability`: share of bootstrap resamples that find this very interval; `parameters`: of its
    student, correction included; `correction`: "none", "affine" or the rank of a low-rank one."""

    __pydantic_config__ = STRICT

    first: BlockIndex
    last: BlockIndex
    score: Finite | None = None
    stability: Finite | None = None
    parameters: Count | None = None
    correction: Correction = "none"

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
    """A part of a block that a projection replaces. `form` of an FFN: "paper" (x + P x) or "gated"
    (P inside norm, modulation and gate); `ffn_joint`, of a block that runs text and image as one,
    is gated. `score`: its damage when measured. `fitted`: what else than the block or student that
    stands there with all intervals on has a projection of its own, as "52" for the teacher's
    block."""

    __pydantic_config__ = STRICT

    block: BlockIndex
    kind: str
    form: str = "paper"
    score: Finite | None = None
    fitted: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.block}"

    @property
    def sites(self) -> tuple[WidthSite, ...]:
        """Itself: a switch of one site, as a TextGroup is one of several."""
        return (self,)


@dataclass(frozen=True)
class TextGroup:
    """Neighbouring text sites: they switch as one, since a restored block inside would step the
    text."""

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
    """A named set of intervals and sites that are switched on. `damage`: relative squared velocity
    error; `flops`: of one forward at the plan's reference size; `tuned`: it has weights of its own
    (fine-tuned)."""

    __pydantic_config__ = STRICT

    name: str
    intervals: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    parameters: Count | None = None
    bytes: Count | None = None
    flops: Finite | None = None
    milliseconds: Finite | None = None
    damage: Finite | None = None
    tuned: bool = False
