"""PruningPlan: what is replaced, by what, and what it costs. Frozen, JSON both ways.

Indices are the teacher's, from 0. An interval [first, last] includes both ends: these blocks
are replaced by one student (paper, section 3.3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated

from pydantic import Field

from .system.json_text import json_text
from .system.schemas import (
    MOST_BLOCKS,
    STRICT,
    BlockIndex,
    Count,
    Finite,
    read_json_text,
    read_value,
)

FORMAT_VERSION = 1
FORMS = ("paper", "gated")
FORMS_OF = {"text": FORMS, "ffn_image": FORMS, "ffn_text": FORMS, "ffn_joint": ("gated",)}
SITE_KINDS = tuple(FORMS_OF)
FULL, ALL = "full", "all"
_NUMBER = "[0-9]{1,6}"  # not \d, which takes the digits of all scripts
_NAME = rf"({_NUMBER}-{_NUMBER}|[a-z_]+:{_NUMBER}(-{_NUMBER})?)"
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


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """Raises ValueError, naming the part, for anything that cannot be applied."""

    __pydantic_config__ = STRICT

    architecture: str
    config: dict
    num_blocks: Annotated[int, Field(ge=0, le=MOST_BLOCKS)]
    fingerprint: str
    intervals: tuple[Interval, ...] = ()
    sites: tuple[WidthSite, ...] = ()
    variants: tuple[Variant, ...] = ()
    provenance: dict = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def __post_init__(self):
        if self.version != FORMAT_VERSION:
            raise ValueError(
                f"plan format {self.version} is not {FORMAT_VERSION}; update ComfyUI-PPCL"
            )
        for interval in self.intervals:
            if not 0 <= interval.first < interval.last < self.num_blocks:
                raise ValueError(
                    f"interval {interval.name} is not inside blocks 0-{self.num_blocks - 1} "
                    "with at least two blocks; correct the plan"
                )
        ordered = sorted(self.intervals, key=lambda i: i.first)
        for left, right in zip(ordered, ordered[1:], strict=False):
            if right.first <= left.last:
                raise ValueError(
                    f"intervals {left.name} and {right.name} overlap; correct the plan"
                )
        self._check_sites()
        for group in self.text_groups:
            self._check_group(group)
        for variant in self.variants:
            self._check_variant(variant)

    @cached_property
    def _intervals(self) -> dict[str, Interval]:
        return {interval.name: interval for interval in self.intervals}

    @cached_property
    def _switches(self) -> dict[str, WidthSite | TextGroup]:
        return {switch.name: switch for switch in self.switches}

    def interval(self, name: str) -> Interval:
        if name in self._intervals:
            return self._intervals[name]
        known = ", ".join(i.name for i in self.intervals) or "none"
        raise ValueError(f"interval {name!r} is not in the plan; it has: {known}")

    @property
    def text_groups(self) -> tuple[TextGroup, ...]:
        """Runs of neighbouring text sites, in order."""
        groups: list[list[WidthSite]] = []
        for site in sorted((s for s in self.sites if s.kind == "text"), key=lambda s: s.block):
            if groups and groups[-1][-1].block == site.block - 1:
                groups[-1].append(site)
            else:
                groups.append([site])
        return tuple(TextGroup(tuple(group)) for group in groups)

    @property
    def switches(self) -> tuple[WidthSite | TextGroup, ...]:
        """What a variant can switch besides intervals: FFN sites one by one, text by whole
        group."""
        return (*(s for s in self.sites if s.kind != "text"), *self.text_groups)

    def site(self, name: str) -> WidthSite | TextGroup:
        if name in self._switches:
            return self._switches[name]
        known = ", ".join(s.name for s in self.switches) or "none"
        raise ValueError(f"width site {name!r} is not in the plan; it has: {known}")

    def variant(self, name: str | None) -> Variant:
        """By name; None is the smallest named variant; "full" and "all" (everything on) are always
        there.

        A comma-separated list of intervals and sites ("3-4,8-10,text:51-59") is an unnamed variant.
        """
        if name is None:
            return (
                min(self.variants, key=lambda v: v.parameters or 0)
                if self.variants
                else self.everything()
            )
        for variant in self.variants:
            if variant.name == name:
                return variant
        if name == FULL:
            return Variant(name=FULL)
        if name == ALL:
            return self.everything()
        if re.fullmatch(f"{_NAME}(,{_NAME})*", name):
            parts = name.split(",")
            intervals, sites = (
                tuple(p for p in parts if (":" in p) == site) for site in (False, True)
            )
            return self._check_variant(Variant(name=name, intervals=intervals, sites=sites))
        known = ", ".join([v.name for v in self.variants] + [FULL])
        raise ValueError(
            f"variant {name!r} is not in the plan; it has: {known}, or parts as in '3-4,8-10,text:51-59'"
        )

    def _check_variant(self, variant: Variant) -> Variant:
        for name in variant.intervals:
            self.interval(name)
        for name in variant.sites:
            self.site(name)
        for names, what in ((variant.intervals, "an interval"), (variant.sites, "a site")):
            if len(set(names)) < len(names):
                raise ValueError(f"variant {variant.name!r} names {what} twice; name each once")
        return variant

    def _check_sites(self) -> None:
        """Once through sites and blocks: a file may name thousands."""
        inside = {block: interval for interval in self.intervals for block in interval.blocks[1:]}
        text = {site.block for site in self.sites if site.kind == "text"}
        seen: set[tuple[int, str]] = set()
        for site in self.sites:
            self._check_site(site)
            if (site.block, site.kind) in seen:
                raise ValueError(f"width site {site.name} is there twice; name it once")
            seen.add((site.block, site.kind))
            if site.kind != "text" and site.block in inside:
                interval = inside[site.block]
                raise ValueError(
                    f"width site {site.name}: block {site.block} is inside interval {interval.name}, whose student "
                    f"is block {interval.first}; name that one"
                )
            if site.kind == "ffn_text" and site.block in text:
                raise ValueError(
                    f"width site {site.name}: a text group replaces this FFN already; drop one of the two"
                )

    def _check_site(self, site: WidthSite) -> None:
        if site.kind not in SITE_KINDS:
            raise ValueError(
                f"width site kind {site.kind!r} is unknown; known: {', '.join(SITE_KINDS)}"
            )
        if site.form not in FORMS_OF[site.kind]:
            forms = ", ".join(FORMS_OF[site.kind])
            raise ValueError(
                f"width site {site.name}: form {site.form!r} is unknown; known: {forms}"
            )
        if not 0 <= site.block < self.num_blocks:
            raise ValueError(
                f"width site {site.name}: there are blocks 0-{self.num_blocks - 1} only; correct the plan"
            )

    def _check_group(self, group: TextGroup) -> None:
        if group.first == 0:
            raise ValueError(
                f"text group {group.name} has no full block before it; start it at block 1 or later"
            )
        for interval in self.intervals:
            inside = sum(group.first <= block <= group.last for block in interval.blocks)
            if 0 < inside < len(interval.blocks):
                raise ValueError(
                    f"text group {group.name} cuts interval {interval.name}; let it hold all or none of it"
                )

    def intervals_of(self, variant: Variant) -> list[Interval]:
        return [self.interval(name) for name in variant.intervals]

    def everything(self) -> Variant:
        names = tuple(i.name for i in self.intervals)
        return Variant(name=ALL, intervals=names, sites=tuple(s.name for s in self.switches))

    def check_teacher(self, architecture: str, fingerprint: str, where: object) -> None:
        if architecture != self.architecture:
            raise ValueError(
                f"{where} is {architecture}, the plan is for {self.architecture}; choose its base model"
            )
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{where} (fingerprint {fingerprint[:12]}) is not the teacher of this plan "
                f"({self.fingerprint[:12]}); choose the base model it was made from"
            )

    def to_json(self) -> str:
        return json_text(asdict(self))

    def with_parts(self, **parts) -> PruningPlan:
        return replace(self, **parts)


def plan_from_json(text: str | bytes, where: object = "plan") -> PruningPlan:
    """The inverse of `PruningPlan.to_json`. Raises ValueError naming the unknown, missing or wrong
    field."""
    return plan_from_value(read_json_text(text, where), where)


def plan_from_value(values: object, where: object = "plan") -> PruningPlan:
    """The same of JSON that was parsed."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a plan is a JSON object")
    version = values.get("version", FORMAT_VERSION)
    if type(version) is int and version != FORMAT_VERSION:  # its fields may be unknown too
        raise ValueError(
            f"{where}: plan format {version} is not {FORMAT_VERSION}; update ComfyUI-PPCL"
        )
    return read_value(PruningPlan, values, where)


def parse_intervals(text: str) -> tuple[Interval, ...]:
    """ "3-4 5-7" or "3-4,5-7" -> intervals. Raises ValueError naming the part that is not one."""
    intervals = []
    for part in text.replace(",", " ").split():
        if not re.fullmatch(f"{_NUMBER}-{_NUMBER}", part):
            raise ValueError(f"{part[:40]!r} is not an interval; write them as '3-4 8-10'")
        first, last = map(int, part.split("-"))
        _check_numbers(part, (first, last))
        intervals.append(Interval(first=first, last=last))
    return tuple(intervals)


def parse_sites(text: str, form: str = "paper") -> tuple[WidthSite, ...]:
    """ "ffn_image:2 text:51-59" -> sites. Raises ValueError naming the part that is not one."""
    sites = []
    for part in text.replace(",", " ").split():
        match = re.fullmatch(rf"([a-z_]+):({_NUMBER})(?:-({_NUMBER}))?", part)
        if not match or match[1] not in SITE_KINDS:
            raise ValueError(
                f"{part[:40]!r} is not a width site; write them as 'ffn_image:2 text:51-59'"
            )
        first, last = int(match[2]), int(match[3] or match[2])
        _check_numbers(part, (first, last))
        chosen = (
            form if match[1] != "text" and form in FORMS_OF[match[1]] else FORMS_OF[match[1]][0]
        )
        sites += [
            WidthSite(block=block, kind=match[1], form=chosen) for block in range(first, last + 1)
        ]
    return tuple(sites)


def _check_numbers(part: str, blocks: Iterable[int]) -> None:
    if max(blocks) >= MOST_BLOCKS:
        raise ValueError(
            f"{part[:40]!r}: blocks are numbered from 0, and no model has more than {MOST_BLOCKS}"
        )
