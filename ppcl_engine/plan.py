"""PruningPlan: what is replaced, by what, and what it costs. Frozen, JSON both ways.

Indices are the teacher's, from 0. An interval [first, last] includes both ends: these blocks
are replaced by one student (paper, section 3.3).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from types import UnionType
from typing import get_args, get_origin

from .settings.base_settings import hints_of
from .system.json_text import json_text

FORMAT_VERSION = 1
FORMS = ("paper", "gated")
FORMS_OF = {"text": FORMS, "ffn_image": FORMS, "ffn_text": FORMS, "ffn_joint": ("gated",)}
SITE_KINDS = tuple(FORMS_OF)
FULL, ALL = "full", "all"
_NAME = r"(\d+-\d+|[a-z_]+:\d+(-\d+)?)"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Blocks first..last. `score`: damage on the final velocity (relative, squared) when measured;
    `stability`: share of bootstrap resamples that find this very interval; `parameters`: of its
    student, correction included; `correction`: "none", "affine" or the rank of a low-rank one."""

    first: int
    last: int
    score: float | None = None
    stability: float | None = None
    parameters: int | None = None
    correction: str = "none"

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

    block: int
    kind: str
    form: str = "paper"
    score: float | None = None
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

    name: str
    intervals: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    parameters: int | None = None
    bytes: int | None = None
    flops: float | None = None
    milliseconds: float | None = None
    damage: float | None = None
    tuned: bool = False


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """Raises ValueError, naming the part, for anything that cannot be applied."""

    architecture: str
    config: dict
    num_blocks: int
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
        for site in self.sites:
            self._check_site(site)
        for group in self.text_groups:
            self._check_group(group)
        for variant in self.variants:
            self._check_variant(variant)

    def interval(self, name: str) -> Interval:
        for interval in self.intervals:
            if interval.name == name:
                return interval
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
        for switch in self.switches:
            if switch.name == name:
                return switch
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
        if sum((s.block, s.kind) == (site.block, site.kind) for s in self.sites) > 1:
            raise ValueError(f"width site {site.name} is there twice; name it once")
        for interval in self.intervals:
            if site.kind != "text" and interval.first < site.block <= interval.last:
                raise ValueError(
                    f"width site {site.name}: block {site.block} is inside interval {interval.name}, whose student "
                    f"is block {interval.first}; name that one"
                )
        if site.kind == "ffn_text" and any(
            s.kind == "text" and s.block == site.block for s in self.sites
        ):
            raise ValueError(
                f"width site {site.name}: a text group replaces this FFN already; drop one of the two"
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


def plan_from_json(text: str, where: object = "plan") -> PruningPlan:
    """The inverse of `PruningPlan.to_json`. Raises ValueError naming the unknown or missing
    field."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number or a nesting without end too
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a plan is a JSON object")
    if values.get("version", FORMAT_VERSION) != FORMAT_VERSION:  # its fields may be unknown too
        raise ValueError(
            f"{where}: plan format {values['version']} is not {FORMAT_VERSION}; update ComfyUI-PPCL"
        )
    parts = {"intervals": Interval, "sites": WidthSite, "variants": Variant}
    for name, kind in parts.items():
        rows = values.get(name, [])
        if not isinstance(rows, list):
            raise ValueError(f"{where}: {name} is a list, found {rows!r}")
        values[name] = tuple(_build(kind, row, f"{where}: {name}") for row in rows)
    return _build(PruningPlan, values, str(where))


def _build(kind, values, where: str):
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, found {values!r}")
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"{where}: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )
    values = {
        k: tuple(v) if k in ("intervals", "sites", "fitted") and isinstance(v, list) else v
        for k, v in values.items()
    }
    for name, hint in hints_of(kind).items():
        if name in values and not _fits(values[name], hint):
            raise ValueError(
                f"{where}: {name} cannot be {str(values[name])[:60]!r}; export it again"
            )
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _fits(value: object, hint) -> bool:
    """Of a field's type; what a tuple holds is looked at where it is read."""
    kinds = {
        get_origin(kind) or kind
        for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,))
    }
    return type(value) in kinds | ({int} if float in kinds else set())


def parse_intervals(text: str) -> tuple[Interval, ...]:
    """ "3-4 5-7" or "3-4,5-7" -> intervals. Raises ValueError naming the part that is not one."""
    intervals = []
    for part in text.replace(",", " ").split():
        if not re.fullmatch(r"\d+-\d+", part):
            raise ValueError(f"{part!r} is not an interval; write them as '3-4 8-10'")
        first, last = map(int, part.split("-"))
        intervals.append(Interval(first=first, last=last))
    return tuple(intervals)


def parse_sites(text: str, form: str = "paper") -> tuple[WidthSite, ...]:
    """ "ffn_image:2 text:51-59" -> sites. Raises ValueError naming the part that is not one."""
    sites = []
    for part in text.replace(",", " ").split():
        match = re.fullmatch(r"([a-z_]+):(\d+)(?:-(\d+))?", part)
        if not match or match[1] not in SITE_KINDS:
            raise ValueError(
                f"{part!r} is not a width site; write them as 'ffn_image:2 text:51-59'"
            )
        first, last = int(match[2]), int(match[3] or match[2])
        chosen = (
            form if match[1] != "text" and form in FORMS_OF[match[1]] else FORMS_OF[match[1]][0]
        )
        sites += [
            WidthSite(block=block, kind=match[1], form=chosen) for block in range(first, last + 1)
        ]
    return tuple(sites)
