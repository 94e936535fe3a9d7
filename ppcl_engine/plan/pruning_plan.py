"""PruningPlan: what is replaced, by what, and what it costs. Frozen, JSON both ways."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated

from pydantic import Field

from ..system.json_text import json_text, shown
from ..system.schemas import MOST_BLOCKS, STRICT
from .parts import ALL, FORMS, FULL, NAME, SITE_KINDS, Interval, TextGroup, Variant, WidthSite

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """What is pruned from a model. Raises ValueError, naming the part, for anything that cannot be
    applied."""

    __pydantic_config__ = STRICT

    architecture: str
    """name of the teacher's architecture"""
    config: dict
    """the teacher's configuration, by diffusers' names"""
    num_blocks: Annotated[int, Field(ge=0, le=MOST_BLOCKS)]
    """the teacher's"""
    fingerprint: str
    """the teacher's (`Weights.fingerprint`)"""
    intervals: tuple[Interval, ...] = ()
    """disjoint"""
    sites: tuple[WidthSite, ...] = ()
    variants: tuple[Variant, ...] = ()
    provenance: dict = field(default_factory=dict)
    """how the plan was made"""
    version: int = FORMAT_VERSION
    """of the format"""

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
        named: set[str] = set()
        for variant in self.variants:
            self._check_variant(variant)
            if variant.name in named:
                raise ValueError(f"variant {shown(variant.name)} is there twice; name it once")
            named.add(variant.name)

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
        """What a variant can switch besides intervals: single FFN sites, and whole text groups."""
        return (*(s for s in self.sites if s.kind != "text"), *self.text_groups)

    def site(self, name: str) -> WidthSite | TextGroup:
        if name in self._switches:
            return self._switches[name]
        known = ", ".join(s.name for s in self.switches) or "none"
        raise ValueError(f"width site {name!r} is not in the plan; it has: {known}")

    def variant(self, name: str | None) -> Variant:
        """A variant by its name; None: the smallest named variant; "full" and "all" (everything on)
        always exist.

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
        if re.fullmatch(f"{NAME}(,{NAME})*", name):
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
        """One pass over sites and blocks, because a file may name thousands."""
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
        if site.form not in FORMS:
            forms = ", ".join(FORMS)
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
                f"{where} is {architecture}, the plan is for {shown(self.architecture)}; choose its base model"
            )
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{where} (fingerprint {fingerprint[:12]}) is not the teacher of this plan "
                f"({shown(self.fingerprint[:12])}); choose the base model it was made from"
            )

    def to_json(self) -> str:
        return json_text(asdict(self))

    def with_parts(self, **parts) -> PruningPlan:
        return replace(self, **parts)
